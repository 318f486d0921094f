"""A task is data and a kind; this is what the rest of the evaluation may ask of one.

``Task``, the same for built-in tasks and a user's own:

    name            str, the name of its row in reports and of its folder of scores
    kind            classification, multilabel, regression, tokens, spans, similarity or retrieval
    labels          texts of the classes, by class id (classification, multilabel, tokens: IOB2 tags)
    texts           names of the text columns
    metrics         names of every metric that is computed
    main            those whose mean is the task's score; GLUE: all, a user's task: the first
    dev_parts       splits on which hyper-parameters are chosen
    scored_parts    splits on which the reported score is computed: a labelled test set, else the dev sets
    metric_keys     metrics, with the split's suffix where there are two (MNLI): keys of ``result["metrics"]``

``Split``, the examples of one part, in the order in which they were read:

    ids             str for each example: the data's own id column, or its row from 0
    labels          gold values, in the form of ``evaluation.measures.predictions``
    shown(row)      the example's text, for people to read
    notes           what was left out or corrected

A model's answers to these examples are in ``evaluation.measures.predictions``. Which of several runs counts
(``grid`` settings) is decided in ``evaluation.finetuning.scores``: ``Plan.chosen`` has one job a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.tasks.rows import Rows
from evaluation.tasks.squad import Question
from infra.files import storage
from infra.settings.task_settings import Kind, TaskSettings


@dataclass(frozen=True)
class Part:
    """One split of a task: its file, official row count (None: any), hub split and GLUE test file."""

    file: str
    rows: int | None
    hub: str
    submission: str | None = None
    folder: str | None = None
    """Of its file, where that is not the task's name."""
    config: str | None = None
    """Of the hub's data set, where that is not the task's."""


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    kind: Kind = "classification"
    hub: tuple[str, ...] = ()
    """Arguments of ``datasets.load_dataset``."""
    texts: tuple[str, ...] = ()
    """Text columns of the official file, found by name whatever the case; the hub's in ``hub_texts``."""
    hub_texts: tuple[str, ...] = ()
    label: str = "label"
    hub_label: str = "label"
    labels: tuple[str, ...] = ("0", "1")
    """The labels as written in the file; the position is the class id. Regression: lower and upper bound."""
    metrics: tuple[str, ...]
    own_main: tuple[str, ...] = ()
    """The metrics whose mean is the score, if not all."""
    parts: dict[str, Part]
    headerless: tuple[str, ...] = ()
    """Column names of train and dev files that have no header (CoLA)."""
    skip_short_rows: bool = False
    """QQP's official train.tsv has a few rows with too few columns; every published count leaves them out."""
    check_labels: Callable[[Rows], None] | None = None
    """Raises UserError where another column of the official file contradicts the label."""
    max_length: int | None = None
    """Tokens, for tasks whose texts are long; None: ``evaluation.max_length``."""
    no_answer: bool = False
    """Of spans: questions may have no answer, as in SQuAD 2.0."""
    settings: TaskSettings | None = None
    """What the user set; with a ``kind`` in it, the task is the user's own."""

    @property
    def own(self) -> TaskSettings | None:
        """The settings of a task of the user's own; None for a built-in one."""
        return self.settings if self.settings is not None and self.settings.kind is not None else None

    @property
    def pooling(self) -> str:
        return self.settings.pooling if self.settings is not None else "mean"

    @property
    def main(self) -> tuple[str, ...]:
        """The metrics whose mean is the task's score."""
        return self.own_main or self.metrics

    @property
    def scored_parts(self) -> list[str]:
        """The splits on which the reported score is computed."""
        return ["test"] if self.own is not None and "test" in self.parts else self.dev_parts

    @property
    def dev_parts(self) -> list[str]:
        return [name for name in self.parts if name.startswith("dev")]

    @property
    def test_parts(self) -> list[str]:
        return [name for name, part in self.parts.items() if part.submission]

    @property
    def metric_keys(self) -> list[str]:
        """Metric names; with the part's suffix where a task has two dev sets (MNLI)."""
        return self.keys_of(self.metrics)

    def keys_of(self, metrics: tuple[str, ...]) -> list[str]:
        return [f"{metric}{self.suffix(part)}" for part in self.scored_parts for metric in metrics]

    def suffix(self, part: str) -> str:
        """What tells the metrics of two dev sets apart."""
        return part.removeprefix("dev") if len(self.dev_parts) > 1 else ""


@dataclass(frozen=True)
class Split:
    """Examples of one part. ``texts`` of ``tokens``: the words; of ``retrieval``: the queries."""

    texts: list[tuple[str, ...]]
    labels: Any
    """In the form of the task's kind (``evaluation.measures.predictions``); None for a test part of GLUE."""
    index: list[str] = field(default_factory=list)
    """The id column, if there is one."""
    questions: list[Question] = field(default_factory=list)
    """Of ``spans``, instead of texts and labels."""
    corpus: dict[str, str] = field(default_factory=dict)
    """Of ``retrieval``: id -> document."""
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.questions) or len(self.texts)

    @property
    def ids(self) -> list[str]:
        """One for each example: the data's own, or its row from 0."""
        if self.questions:
            return [question.id for question in self.questions]
        return self.index or [str(row) for row in range(len(self))]

    def shown(self, row: int) -> str:
        """The example's text, for people to read."""
        if self.questions:
            return f"{self.questions[row].question} / {self.questions[row].context}"
        return " / ".join(self.texts[row])

    def digest(self) -> str:
        """Of everything a score depends on."""
        labels = [] if self.labels is None else _listed(self.labels)
        content = "\x1e".join("\x1f".join(row) for row in self.texts) + repr(labels) + repr(self.questions)
        content += repr(self.corpus) if self.corpus else ""
        return storage.digest_bytes(content.encode("utf-8", "surrogatepass"))


def _listed(labels: Any) -> list[Any]:
    if isinstance(labels, np.ndarray):
        return labels.tolist()
    return [row.tolist() if isinstance(row, np.ndarray) else row for row in labels]
