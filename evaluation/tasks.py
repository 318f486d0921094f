"""The evaluation tasks as a table: GLUE (arXiv 1804.07461), IMDb (Maas et al. 2011), SQuAD v1.1.

A split's rows come from the official file where ``evaluation.data`` names a directory, else from the
hub. Row counts are the official ones; a difference is a note on the split, not an error, because a
sample of a task is a legitimate thing to evaluate on.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from evaluation import hub_rows, official
from evaluation.official import Table
from evaluation.squad import Question, place_answers, read_questions
from infra import storage
from infra.errors import UserError


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


_GLUE_ON_THE_HUB = "nyu-mll/glue"


def _glue(
    name: str,
    rows: tuple[int, ...],
    *,
    texts: tuple[str, ...] = ("sentence1", "sentence2"),
    metrics: tuple[str, ...] = ("accuracy",),
    **more: Any,
) -> Task:
    """A task in GLUE's layout. rows: of train, dev and, where the benchmark's server scores it, test."""
    parts = {"train": Part("train.tsv", rows[0], "train"), "dev": Part("dev.tsv", rows[1], "validation")}
    if len(rows) == 3:
        parts["test"] = Part("test.tsv", rows[2], "test", submission=name)
    hub = (_GLUE_ON_THE_HUB, name.lower().replace("-", ""))
    fields: dict[str, Any] = {"hub": hub, "texts": texts, "metrics": metrics, "parts": parts} | more
    return Task(name=name, **fields)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue(
            "CoLA",
            (8_551, 1_043, 1_063),
            texts=("sentence",),
            metrics=("matthews",),
            headerless=("source", "label", "mark", "sentence"),
            witness=official.require_marks,
        ),
        _glue("SST-2", (67_349, 872, 1_821), texts=("sentence",)),
        _glue(
            "MRPC",
            (3_668, 408, 1_725),
            texts=("#1 String", "#2 String"),
            hub_texts=("sentence1", "sentence2"),
            label="Quality",
            metrics=("accuracy", "f1"),
        ),
        _glue(
            "STS-B",
            (5_749, 1_500, 1_379),
            kind="regression",
            label="score",
            labels=("0", "5"),
            metrics=("pearson", "spearman"),
        ),
        _glue(
            "QQP",
            (363_846, 40_430, 390_965),
            texts=("question1", "question2"),
            label="is_duplicate",
            metrics=("accuracy", "f1"),
            skip_short_rows=True,
        ),
        _glue(
            "MNLI",
            (392_702, 9_815, 9_796),
            hub_texts=("premise", "hypothesis"),
            label="gold_label",
            labels=("entailment", "neutral", "contradiction"),
            witness=official.require_majority,
            parts={
                "train": Part("train.tsv", 392_702, "train"),
                "dev_matched": Part("dev_matched.tsv", 9_815, "validation_matched"),
                "dev_mismatched": Part("dev_mismatched.tsv", 9_832, "validation_mismatched"),
                "test_matched": Part("test_matched.tsv", 9_796, "test_matched", submission="MNLI-m"),
                "test_mismatched": Part(
                    "test_mismatched.tsv", 9_847, "test_mismatched", submission="MNLI-mm"
                ),
            },
        ),
        _glue(
            "QNLI",
            (104_743, 5_463, 5_463),
            texts=("question", "sentence"),
            labels=("entailment", "not_entailment"),
        ),
        _glue("RTE", (2_490, 277, 3_000), labels=("entailment", "not_entailment")),
        _glue("WNLI", (635, 71, 146)),
        Task(
            name="IMDb",
            hub=("stanfordnlp/imdb",),
            texts=("text",),
            labels=("neg", "pos"),
            metrics=("accuracy",),
            parts={
                "train": Part("aclImdb/train", 25_000, "train"),
                "dev": Part("aclImdb/test", 25_000, "test"),
            },
            max_length=512,
        ),
        Task(
            name="SQuAD",
            kind="spans",
            hub=("rajpurkar/squad",),
            texts=("question", "context"),
            labels=("start", "end"),
            metrics=("exact_match", "f1"),
            parts={
                "train": Part("train-v1.1.json", 87_599, "train"),
                "dev": Part("dev-v1.1.json", 10_570, "validation"),
            },
            max_length=384,
        ),
    )
}
GLUE = tuple(name for name, task in TASKS.items() if task.hub[0] == _GLUE_ON_THE_HUB)
"""The benchmark's own tasks, whose mean is the macro score."""


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


def find_task(name: str) -> Task:
    """The task of that name, whatever its case; UserError with the nearest name."""
    known = {key.lower(): task for key, task in TASKS.items()}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.4)
    hint = f"did you mean {known[near[0]].name}?" if near else f"known are {', '.join(TASKS)}"
    raise UserError(f"evaluation.tasks: no task is called {name!r}; {hint}")


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks in the order given; UserError for an unknown or repeated name."""
    tasks = [find_task(name) for name in names]
    for position, task in enumerate(tasks):
        if task in tasks[:position]:
            raise UserError(f"evaluation.tasks: {task.name} is named twice")
    return tasks


def load(task: Task, part: str, data: str | None) -> Split:
    """Rows of one part from the directory ``data`` of official files, or from the hub where it is None.

    UserError: missing file, wrong column count or label (with the line number), a label that contradicts its
    own row, no rows. What had to be left out or put right is in the split's notes.
    """
    split = _from_files(task, part, data) if data is not None else _from_hub(task, part)
    official_rows = task.parts[part].rows
    if len(split) == 0:
        raise UserError(f"{task.name} {part}: {task.parts[part].file} has no rows")
    empty = [row for row, texts in enumerate(split.texts) if not all(text.strip() for text in texts)]
    if empty and len(empty) == len(split.texts):
        raise UserError(f"{task.name} {part}: every row has an empty text")
    if empty:
        split.notes.append(f"rows with an empty text: {len(empty):,} (first: row {empty[0] + 1})")
    if len(split) != official_rows:
        split.notes.append(f"{len(split):,} rows, the official set has {official_rows:,}")
    split.notes[:] = [f"{task.name} {part}: {note}" for note in split.notes]
    return split


def has_part(task: Task, part: str, data: str | None) -> bool:
    """Whether the official file of a part is there (the hub has them all)."""
    return data is None or official.find(task.name, task.parts[part].file, data) is not None


def _from_files(task: Task, part: str, data: str) -> Split:
    path = official.require_file(task.name, task.parts[part].file, data)
    if task.kind == "spans":
        return _answered(read_questions(path), path)
    if task.name == "IMDb":
        texts, ids = official.read_reviews(path, task.labels)
        return Split(texts, np.asarray(ids, dtype=np.int64))
    is_test = task.parts[part].submission is not None
    table = official.read_tsv(path, () if is_test else task.headerless, task.skip_short_rows)
    if is_test:
        return Split(_columns(table, task.texts), None, index=[row[0] for row in table.rows])
    if task.witness is not None:
        task.witness(table)
    split = _labelled(task, table, task.texts, task.label)
    if table.skipped:
        split.notes.append(f"{table.skipped} torn rows left out")
    return split


def _answered(questions: Sequence[Question], where: str) -> Split:
    kept, notes = place_answers(questions, where)
    return Split([], None, questions=kept, notes=notes)


def _labelled(task: Task, table: Table, texts: Sequence[str], label: str) -> Split:
    """The table's rows with labels that are among the task's."""
    rows = _columns(table, texts)
    if task.kind == "regression":
        low, high = map(float, task.labels)
        labels = np.asarray(table.numbers(label, low, high), dtype=np.float32)
    else:
        labels = np.asarray(table.classes(label, task.labels), dtype=np.int64)
    return Split(rows, labels)


def _columns(table: Table, names: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(table.column(name) for name in names), strict=True))


# The hub


def _from_hub(task: Task, part: str) -> Split:
    import datasets

    name = "/".join(task.hub)
    try:
        rows = datasets.load_dataset(*task.hub, split=task.parts[part].hub)
    except Exception as error:  # the library raises many unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{task.name}: cannot load {name} from the hub ({reason}); "
            "name a directory of official files with evaluation.data or --data"
        ) from error
    where = f"{name} {task.parts[part].hub}"
    if task.kind == "spans":
        return _answered(hub_rows.questions(rows, where), where)
    texts = task.hub_texts or task.texts
    if task.parts[part].submission is not None:
        table = hub_rows.table(rows, texts, "idx", where)
        return Split(_columns(table, texts), None, index=table.column("idx"))
    labels = task.labels if task.kind == "classification" else ()
    table = hub_rows.table(rows, texts, task.hub_label, where, labels)
    split = _labelled(task, table, texts, task.hub_label)
    if task.name == "IMDb":
        split.texts[:] = [(official.without_markup(text),) for (text,) in split.texts]
    return split
