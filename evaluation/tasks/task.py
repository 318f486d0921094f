"""Defines tasks and their splits, for built-in tasks and a user's own.

A model's answers to the examples of a split are in ``evaluation.kinds.predictions``. If a task has a grid of
hyper-parameters, ``Plan.chosen`` in ``evaluation.finetuning.scores`` decides which runs count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from evaluation.tasks.answer_spans import Question
from evaluation.tasks.row_files import Rows
from infra.files import storage
from infra.settings.sections.task_settings import Kind, TaskSettings


@dataclass(frozen=True)
class Part:
    """Where the examples of one split of a task come from."""

    file: str
    """Path of the official file within the task's folder."""
    rows: int | None
    """Published number of rows, with which a report compares the file; None: no comparison."""
    hub: str
    """Name of the split on the hub."""
    submission: str | None = None
    """Name of the split's file, without ending, in a GLUE submission; only for unlabelled test splits."""
    folder: str | None = None
    """Folder of the official file, if it is not named after the task."""
    config: str | None = None
    """Configuration of the hub dataset, if it is not the task's."""


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    kind: Kind = "classification"
    hub: tuple[str, ...] = ()
    """Arguments of ``datasets.load_dataset``."""
    texts: tuple[str, ...] = ()
    """Names of the text columns in official files, in upper or lower case."""
    hub_texts: tuple[str, ...] = ()
    """Names of the text columns on the hub, if they differ from ``texts``."""
    label: str = "label"
    """Name of the label column in official files."""
    hub_label: str = "label"
    """Name of the label column on the hub."""
    labels: tuple[str, ...] = ("0", "1")
    """Labels as written in the file, in the order of their ids: classes, or IOB2 tags (kind ``tokens``); of a
    regression, the smallest and the largest."""
    metrics: tuple[str, ...]
    own_main_metrics: tuple[str, ...] = ()
    """The metrics whose mean is the score, in a user's own task the first; empty if all."""
    parts: dict[str, Part]
    """Name of a split (train, dev, dev_matched, test, ...) -> where its examples come from."""
    headerless: tuple[str, ...] = ()
    """Column names, if the train and dev files have no header line (CoLA)."""
    skip_short_rows: bool = False
    """Whether to leave out rows with too few columns. The published row counts of QQP leave them out, too."""
    check_labels: Callable[[Rows], None] | None = None
    """Function that raises UserError if another column of the official file contradicts a label."""
    max_length: int | None = None
    """Number of tokens to which rows are cut, for tasks with long texts; None: ``evaluation.max_length``."""
    no_answer: bool = False
    """Whether questions may have no answer, as in SQuAD 2.0 (kind ``spans``)."""
    settings: TaskSettings | None = None
    """Settings that the user gave; with a ``kind``, the task is the user's own, else a built-in one."""

    @property
    def own(self) -> TaskSettings | None:
        """The settings of a user's own task; None for a built-in task."""
        return self.settings if self.settings is not None and self.settings.kind is not None else None

    @property
    def pooling(self) -> str:
        return self.settings.pooling if self.settings is not None else "mean"

    @property
    def main_metrics(self) -> tuple[str, ...]:
        """The metrics whose mean is the task's score."""
        return self.own_main_metrics or self.metrics

    @property
    def scored_parts(self) -> list[str]:
        """Splits on which the reported score is computed: a labelled test set, else the dev sets."""
        return ["test"] if self.own is not None and "test" in self.parts else self.dev_parts

    @property
    def dev_parts(self) -> list[str]:
        """Splits on which hyper-parameters are chosen."""
        return [name for name in self.parts if name.startswith("dev")]

    @property
    def test_parts(self) -> list[str]:
        return [name for name, part in self.parts.items() if part.submission]

    @property
    def metric_keys(self) -> list[str]:
        """Names of all metrics; with the split's suffix if the task has two dev sets (MNLI)."""
        return self.keys_of(self.metrics)

    def keys_of(self, metrics: tuple[str, ...]) -> list[str]:
        """Returns those of ``metric_keys`` that belong to these metrics."""
        return [f"{metric}{self.suffix(part)}" for part in self.scored_parts for metric in metrics]

    def suffix(self, part: str) -> str:
        """Returns the suffix of a split's metrics: for "dev_matched" "_matched", for the only dev set ""."""
        return part.removeprefix("dev") if len(self.dev_parts) > 1 else ""


@dataclass(frozen=True)
class Split:
    """The examples of one split."""

    texts: list[tuple[str, ...]]
    """The texts of each example; its words (kind ``tokens``), or the query (kind ``retrieval``)."""
    labels: Any
    """Gold values in the form of the kind (``evaluation.kinds.predictions``); None if unlabelled."""
    index: list[str] = field(default_factory=list)
    """Values of the id column; empty if there is none."""
    questions: list[Question] = field(default_factory=list)
    """The examples of kind ``spans``, which have no ``texts`` and ``labels``."""
    corpus: dict[str, str] = field(default_factory=dict)
    """Id -> document (kind ``retrieval``)."""
    notes: list[str] = field(default_factory=list)
    """What was left out or corrected, one sentence each."""

    def __len__(self) -> int:
        return len(self.questions) or len(self.texts)

    @property
    def ids(self) -> list[str]:
        """An id per example: the data's own, or the row's number from 0."""
        if self.questions:
            return [question.id for question in self.questions]
        return self.index or [str(row) for row in range(len(self))]

    def text_of(self, row: int) -> str:
        """Returns the example's text, for people to read."""
        if self.questions:
            return f"{self.questions[row].question} / {self.questions[row].context}"
        return " / ".join(self.texts[row])

    def digest(self) -> str:
        """Returns a digest of the split's texts, labels, questions and documents, on which scores depend."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """Every job's key holds it; it took 0.6 s for as many rows as QQP's training set has."""
        labels = [] if self.labels is None else _listed(self.labels)
        content = "\x1e".join("\x1f".join(row) for row in self.texts) + repr(labels) + repr(self.questions)
        content += repr(self.corpus) if self.corpus else ""
        return storage.digest_bytes(content.encode("utf-8", "surrogatepass"))


def _listed(labels: Any) -> list[Any]:
    if isinstance(labels, np.ndarray):
        return labels.tolist()
    return [row.tolist() if isinstance(row, np.ndarray) else row for row in labels]
