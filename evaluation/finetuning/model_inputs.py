"""Selects the inputs that a model's forward takes, and replaces segment ids that have no embedding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

NAMES = ("input_ids", "attention_mask", "token_type_ids")
Array = TypeVar("Array")


def input_names(model: Any) -> list[str]:
    """Returns those of ``NAMES`` that the model's forward takes."""
    taken = inspect.signature(model.forward).parameters
    return [name for name in NAMES if name in taken]


def inputs_of(model: Any) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """Returns a function that selects the model's inputs from name -> array int64 [B, L] (numpy or torch).

    It replaces a segment id without an embedding by 0. Tokenizers give the texts of a pair the segment ids 0
    and 1 for every model, but RoBERTa, for example, has only one segment embedding.
    """
    names = input_names(model)
    segment_types = getattr(getattr(model, "config", None), "type_vocab_size", None)

    def select(arrays: Mapping[str, Array]) -> dict[str, Array]:
        selected = {name: arrays[name] for name in names}
        if segment_types is not None and "token_type_ids" in selected:
            ids: Any = selected["token_type_ids"]
            selected["token_type_ids"] = ids * (ids < segment_types)
        return selected

    return select
