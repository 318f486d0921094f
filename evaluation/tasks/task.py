"""What a task is, and the rows of one of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from evaluation.tasks.official import Table
from evaluation.tasks.squad import Question
from infra.files import storage


@dataclass(frozen=True)
class Part:
    """One split of a task: its official file, official row count, hub split and GLUE test file."""

    file: str
    rows: int
    hub: str
    submission: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    kind: Literal["classification", "regression", "spans"] = "classification"
    hub: tuple[str, ...]
    """Arguments of ``datasets.load_dataset``."""
    texts: tuple[str, ...]
    """Text columns of the official file, found by name whatever the case; the hub's in ``hub_texts``."""
    hub_texts: tuple[str, ...] = ()
    label: str = "label"
    hub_label: str = "label"
    labels: tuple[str, ...] = ("0", "1")
    """The labels as written in the file; the position is the class id. Regression: lower and upper bound."""
    metrics: tuple[str, ...]
    parts: dict[str, Part]
    headerless: tuple[str, ...] = ()
    """Column names of train and dev files that have no header (CoLA)."""
    skip_short_rows: bool = False
    """QQP's official train.tsv has a few torn rows; every published count leaves them out."""
    witness: Callable[[Table], None] | None = None
    """Raises UserError where another column of the official file contradicts the label."""
    max_length: int | None = None
    """Tokens, for tasks whose texts are long; None: ``evaluation.max_length``."""

    @property
    def dev_parts(self) -> list[str]:
        return [name for name in self.parts if name.startswith("dev")]

    @property
    def test_parts(self) -> list[str]:
        return [name for name, part in self.parts.items() if part.submission]

    @property
    def outputs(self) -> int:
        """Width of the model's output: classes, or one number."""
        return 1 if self.kind == "regression" else len(self.labels)

    @property
    def metric_keys(self) -> list[str]:
        """Metric names; with the part's suffix where a task has two dev sets (MNLI)."""
        if len(self.dev_parts) == 1:
            return list(self.metrics)
        return [f"{metric}{part.removeprefix('dev')}" for part in self.dev_parts for metric in self.metrics]


@dataclass(frozen=True)
class Split:
    """Rows of one part. ``labels``: int64 [n] classes or float32 [n] scores; None for a test part."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray | None
    index: list[str] = field(default_factory=list)
    """The id column of a test file."""
    questions: list[Question] = field(default_factory=list)
    """SQuAD instead of texts and labels."""
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.questions) or len(self.texts)

    def digest(self) -> str:
        """Of everything a score depends on."""
        labels = [] if self.labels is None else self.labels.tolist()
        content = "\x1e".join("\x1f".join(row) for row in self.texts) + repr(labels) + repr(self.questions)
        return storage.digest_bytes(content.encode("utf-8", "surrogatepass"))
