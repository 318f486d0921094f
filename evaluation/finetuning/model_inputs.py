"""Which inputs a model's forward takes, and segment ids that it has embeddings for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

NAMES = ("input_ids", "attention_mask", "token_type_ids")
Array = TypeVar("Array")


def input_names(model: Any) -> list[str]:
    """Those of ``NAMES`` that the model's forward takes."""
    taken = inspect.signature(model.forward).parameters
    return [name for name in NAMES if name in taken]


def inputs_of(model: Any) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """A function that selects the inputs of the model's forward from arrays int64 [B, L] (numpy or torch).

    A segment id without an embedding in the model becomes 0. Tokenizers number the two texts of a pair 0 and
    1 for every model, but a RoBERTa, for example, has only one segment type.
    """
    names = input_names(model)
    types = getattr(getattr(model, "config", None), "type_vocab_size", None)

    def pick(arrays: Mapping[str, Array]) -> dict[str, Array]:
        found = {name: arrays[name] for name in names}
        if types is not None and "token_type_ids" in found:
            ids: Any = found["token_type_ids"]
            found["token_type_ids"] = ids * (ids < types)
        return found

    return pick
