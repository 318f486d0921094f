"""Tokenises names of control tokens within a text as ordinary text.

A document about web pages may contain ``<s>``, and one about BERT ``[SEP]``. As real control tokens they
would end a segment or pad a row. Other added tokens, such as ``[URL]``, keep their ids. The teacher pass and
the evaluation both tokenize with this module, so a text has the same ids in both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONTROL = (
    "bos_token",
    "cls_token",
    "eos_token",
    "mask_token",
    "pad_token",
    "sep_token",
    "unk_token",
)
"""Attributes of a transformers tokenizer that name its control tokens."""


def read_as_text(tokenizer: Any) -> None:
    """Makes a fast transformers tokenizer split names of control tokens within a text into ordinary pieces.

    ``tokenizers`` can split either all special tokens or none. Special tokens that are not control tokens
    therefore become ordinary added tokens, with the same ids and the same matching.
    """
    from tokenizers import Tokenizer

    control = {getattr(tokenizer, name) for name in CONTROL}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    other = [
        token for token in content["added_tokens"] if token["special"] and token["content"] not in control
    ]
    if other:
        for token in other:
            token["special"] = False
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))  # there is no public way
    tokenizer.split_special_tokens = True  # of every call; the backend's own flag follows it
    tokenizer.backend_tokenizer.encode_special_tokens = True


@dataclass(frozen=True)
class ControlIds:
    """Ids that only the frame of a row may have, and the id that stands for them within a text."""

    ids: frozenset[int]
    neutral: int
    """That of the unknown token; without one, of the mask token or the padding."""

    @classmethod
    def of(cls, tokenizer: Any) -> ControlIds:
        """Those of a transformers tokenizer that pads."""
        ids = {getattr(tokenizer, f"{name}_id") for name in CONTROL} - {None}
        stand_ins = (tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id)
        neutral = next(token for token in stand_ins if token is not None)
        return cls(frozenset(ids - {neutral}), neutral)

    def neutralise(self, ids: list[int], framed: Sequence[int] | None = None) -> list[int]:
        """``ids`` of a text with control tokens replaced by the neutral id.

        They occur because SentencePiece models know the names of control tokens as pieces. ``framed``: 1
        where an id belongs to the frame of the row and is kept.
        """
        if self.ids.isdisjoint(ids):
            return ids
        framed = framed or [0] * len(ids)
        return [
            self.neutral if token in self.ids and not frame else token
            for token, frame in zip(ids, framed, strict=True)
        ]


def tokenize(tokenizer: Any, *columns: list[str], **options: Any) -> Any:
    """transformers' ``BatchEncoding`` of rows of texts, one list a column, with segment ids.

    ``tokenizer`` has been through ``read_as_text``; ``options`` are those of its call.
    """
    output = tokenizer(*columns, return_token_type_ids=True, return_special_tokens_mask=True, **options)
    control = ControlIds.of(tokenizer)
    framed = output.pop("special_tokens_mask")
    output["input_ids"] = [
        control.neutralise(ids, frame) for ids, frame in zip(output["input_ids"], framed, strict=True)
    ]
    return output
