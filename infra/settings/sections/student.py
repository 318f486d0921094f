"""``student``: the architecture of a student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infra.settings.sections.fields import check_at_least, fingerprinted, require


@dataclass(frozen=True, kw_only=True)
class Student:
    """The student's architecture and initial weights."""

    layers: str | tuple[int, ...] = fingerprinted("every_second")
    """Teacher layers from which the student's layers are initialised: a list, ``last:N``, or
    ``every_second``, which ends with the teacher's last layer."""
    init: Literal["teacher", "random"] = fingerprinted("teacher")
    """Initial weights: copied from the teacher's ``layers``, or random."""
    hidden_size: int | None = fingerprinted(None)
    """None: the teacher's hidden size. A narrower student starts from slices of the teacher's layers unless
    ``init`` is random. For the cosine loss it also learns a projection to the teacher's hidden size."""
    attention_heads: int | None = fingerprinted(None)
    """Number of attention heads per layer. None: the teacher's number."""
    intermediate_size: int | None = fingerprinted(None)
    """Width of the feed-forward layers. None: the teacher's width, reduced in proportion to
    ``hidden_size``."""
    dropout: float = fingerprinted(0.1)
    """Dropout in training. It is kept in the model's configuration, so fine-tuning uses it, too."""

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            name, _, count = self.layers.partition(":")
            valid = self.layers == "every_second" or (name == "last" and count.isdigit() and int(count) > 0)
            allowed = "a list of layer numbers, every_second or last:N"
            require(valid, f"layers: must be {allowed}, not {self.layers!r}")
        else:
            layers = list(self.layers)
            require(len(layers) > 0, "layers: the list is empty; name one or more layers")
            valid = min(layers) >= 0 and layers == sorted(set(layers))
            require(valid, f"layers: must be ascending and distinct, counted from 0, not {layers}")
        require(0 <= self.dropout < 1, f"dropout: must be in [0, 1), not {self.dropout}")
        check_at_least(self, 1, "hidden_size", "attention_heads", "intermediate_size")
