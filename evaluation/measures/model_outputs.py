"""A model's answers to the examples of one split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answers:
    """Labels and outputs in the order of the split's rows; their types depend on the task's kind.

    ``evaluation.kinds.predictions`` lists the types. For classification, for example, labels are int64 [n]
    and outputs float32 [n, classes]. Labels are None in a test set without labels.
    """

    labels: Any
    outputs: Any
    ids: Sequence[str] = ()
    """Ids of the examples; by default their row numbers, from 0."""

    def __post_init__(self) -> None:
        if not self.ids:
            object.__setattr__(self, "ids", [str(row) for row in range(len(self.outputs))])

    def __len__(self) -> int:
        return len(self.outputs)


Predictions = Mapping[str, Answers]
"""Name of a split -> answers to its examples."""
