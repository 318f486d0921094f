"""Reduces a model's vocabulary to its task's tokens: most bytes of a small model are word embeddings.

The control tokens, every token of one character, and the most frequent tokens of the texts are kept. A word
whose token is left out is split into shorter tokens, so no known word becomes unknown.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from evaluation.candidates.models import load_tokenizer
from evaluation.devices.export import load_for_export
from infra.control_tokens import CONTROL
from infra.errors import UserError

CHUNK = 1000
"""Number of texts that are tokenized at once."""


def trim(directory: str, texts: Iterable[str], tokens: int, target: str) -> None:
    """Saves the model of ``directory`` in ``target`` with a vocabulary of ``tokens`` entries. Raises
    UserError if the tokenizer is not WordPiece, or if ``tokens`` is out of range (see ``kept_ids``)."""
    import torch

    tokenizer, model = load_tokenizer(directory), load_for_export(directory)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"]["type"] != "WordPiece":
        raise UserError(f"{directory}: --vocabulary needs a WordPiece tokenizer; leave the option out")
    kept = kept_ids(tokenizer, content, counts(tokenizer, texts), tokens)
    table = model.get_input_embeddings().weight.detach()
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(table[torch.from_numpy(kept)].clone()))
    model.config.vocab_size = len(kept)
    new = {int(old): number for number, old in enumerate(kept)}
    for name in CONTROL:
        if getattr(model.config, f"{name}_id", None) is not None:
            setattr(model.config, f"{name}_id", new[getattr(tokenizer, f"{name}_id")])
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: new[old] for token, old in vocabulary.items() if old in new}
    _renumber(content, new)
    with open(os.path.join(target, "tokenizer.json"), "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False)


def counts(tokenizer: Any, texts: Iterable[str]) -> Counter[int]:
    """Returns id -> how often the token occurs in the texts."""
    occurrences: Counter[int] = Counter()
    listed = list(texts)
    for start in range(0, len(listed), CHUNK):
        for ids in tokenizer(listed[start : start + CHUNK], add_special_tokens=False)["input_ids"]:
            occurrences.update(ids)
    return occurrences


def kept_ids(tokenizer: Any, content: dict[str, Any], occurrences: Counter[int], tokens: int) -> np.ndarray:
    """Returns the ids that are kept, int64 [tokens], ascending. ``content``: content of tokenizer.json.

    Raises UserError if ``tokens`` is out of range.
    """
    vocabulary, prefix = content["model"]["vocab"], content["model"]["continuing_subword_prefix"]
    needed = {token["id"] for token in content["added_tokens"]}
    needed |= {id for token, id in vocabulary.items() if len(token.removeprefix(prefix)) == 1}
    if not len(needed) < tokens <= len(vocabulary):
        raise UserError(
            f"--vocabulary: must be {len(needed) + 1:,} (control tokens and characters) to "
            f"{len(vocabulary):,} (all), not {tokens:,}"
        )
    frequent = sorted(set(vocabulary.values()) - needed, key=lambda id: (-occurrences[id], id))
    return np.sort(np.array([*needed, *frequent[: tokens - len(needed)]], np.int64))


def _renumber(content: dict[str, Any], new: dict[int, int]) -> None:
    """Replaces, in place, control tokens' ids in tokenizer.json's content. ``new``: old id -> new id."""
    for token in content["added_tokens"]:
        token["id"] = new[token["id"]]
    processor = content["post_processor"] or {}
    for token in processor.get("special_tokens", {}).values():  # TemplateProcessing
        token["ids"] = [new[id] for id in token["ids"]]
    for name in ("sep", "cls"):  # BertProcessing: [token, id]
        if name in processor:
            processor[name] = [processor[name][0], new[processor[name][1]]]
    if content.get("padding"):
        content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
