"""Tokenises the names of control tokens within a text as ordinary text.

A document about web pages may contain ``<s>``, and a document about BERT ``[SEP]``. If these names became
real control tokens, they would end a segment or pad a row. Other added tokens, such as ``[URL]``, keep their
ids. The teacher pass and the evaluation both tokenise with this module, so a text has the same ids in both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONTROL = ("bos_token", "cls_token", "eos_token", "mask_token", "pad_token", "sep_token", "unk_token")
"""Attributes of a transformers tokenizer that name its control tokens."""


def read_as_text(tokenizer: Any) -> None:
    """Makes a fast transformers tokenizer split the names of control tokens into ordinary pieces.
    ``tokenizers`` can split either all special tokens or none. Special tokens that are not control tokens
    therefore become ordinary added tokens, with the same ids and the same matching."""
    from tokenizers import Tokenizer

    control = {getattr(tokenizer, name) for name in CONTROL}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = [token for token in content["added_tokens"] if token["special"]]
    other = [token for token in special if token["content"] not in control]
    if other:
        for token in other:
            token["special"] = False
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))  # transformers has no public setter
    tokenizer.split_special_tokens = True  # the default of every call, which sets the backend's flag
    tokenizer.backend_tokenizer.encode_special_tokens = True


@dataclass(frozen=True)
class ControlIds:
    """The ids of a tokenizer's control tokens, and the id that replaces them within a text."""

    ids: frozenset[int]
    """Ids that only tokens added by the tokenizer, such as ``[CLS]`` and ``[SEP]``, may have."""
    replacement: int
    """Id of the unknown token; if the tokenizer has none, of the mask token, else of the padding token."""

    @classmethod
    def of(cls, tokenizer: Any) -> ControlIds:
        """Returns the control ids of a transformers tokenizer, which must have a padding token."""
        ids = {getattr(tokenizer, f"{name}_id") for name in CONTROL} - {None}
        candidates = (tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id)
        replacement = next(token for token in candidates if token is not None)
        return cls(frozenset(ids - {replacement}), replacement)

    def replace_in(self, ids: list[int], special_tokens_mask: Sequence[int] | None = None) -> list[int]:
        """Returns the ids of a text with every control id replaced by ``replacement``. Control ids occur in a
        text because SentencePiece models contain control tokens' names as pieces. ``special_tokens_mask`` is
        1 at each id that the tokenizer added; these ids are kept."""
        if self.ids.isdisjoint(ids):
            return ids
        masked = zip(ids, special_tokens_mask or [0] * len(ids), strict=True)
        return [self.replacement if token in self.ids and not added else token for token, added in masked]


def tokenize(tokenizer: Any, *columns: list[str], **options: Any) -> Any:
    """Returns a transformers ``BatchEncoding`` of rows of one text per column, with ``token_type_ids``.
    ``columns``: one list of texts per column, all of one length. ``tokenizer``: a tokenizer that
    ``read_as_text`` has changed. ``options``: further arguments of the tokenizer's call."""
    output = tokenizer(*columns, return_token_type_ids=True, return_special_tokens_mask=True, **options)
    control = ControlIds.of(tokenizer)
    rows = zip(output["input_ids"], output.pop("special_tokens_mask"), strict=True)
    output["input_ids"] = [control.replace_in(ids, mask) for ids, mask in rows]
    return output
