"""The built-in tasks: GLUE (arXiv 1804.07461), IMDb (Maas et al. 2011), SQuAD 1.1 and 2.0."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from evaluation.sources import own
from evaluation.tasks import official
from evaluation.tasks.task import Part, Task
from infra.errors import UserError
from infra.settings.sections.task_settings import TaskSettings, is_file, read_file

_GLUE_ON_THE_HUB = "nyu-mll/glue"


def _glue(name: str, rows: tuple[int, ...], **fields: Any) -> Task:
    """Returns a task in GLUE's layout, by default of two texts, scored by accuracy.

    ``rows``: official numbers of rows of train, dev and, if the benchmark's server scores the task, test.
    ``fields``: further fields of ``Task``, and those that differ from the defaults.
    """
    parts = {"train": Part("train.tsv", rows[0], "train"), "dev": Part("dev.tsv", rows[1], "validation")}
    if len(rows) == 3:
        parts["test"] = Part("test.tsv", rows[2], "test", submission=name)
    defaults: dict[str, Any] = {"hub": (_GLUE_ON_THE_HUB, name.lower().replace("-", "")), "parts": parts}
    defaults |= {"texts": ("sentence1", "sentence2"), "metrics": ("accuracy",)}
    return Task(name=name, **defaults | fields)


def _squad(name: str, hub: str, version: str, rows: tuple[int, int], no_answer: bool) -> Task:
    """Returns a task in SQuAD's layout. ``rows``: official numbers of questions of train and dev."""
    parts = {
        "train": Part(f"train-{version}.json", rows[0], "train"),
        "dev": Part(f"dev-{version}.json", rows[1], "validation"),
    }
    return Task(
        name=name, kind="spans", hub=(hub,), texts=("question", "context"), labels=("start", "end"),
        metrics=("exact_match", "f1"), parts=parts, max_length=384, no_answer=no_answer,
    )  # fmt: skip


_MNLI_PARTS = {
    "train": Part("train.tsv", 392_702, "train"),
    "dev_matched": Part("dev_matched.tsv", 9_815, "validation_matched"),
    "dev_mismatched": Part("dev_mismatched.tsv", 9_832, "validation_mismatched"),
    "test_matched": Part("test_matched.tsv", 9_796, "test_matched", submission="MNLI-m"),
    "test_mismatched": Part("test_mismatched.tsv", 9_847, "test_mismatched", submission="MNLI-mm"),
    # GLUE's diagnostic set, which the server takes as AX
    "test_diagnostic": Part("diagnostic.tsv", 1_104, "test", "AX", folder="diagnostic", config="ax"),
}
_IMDB_PARTS = {"train": Part("aclImdb/train", 25_000, "train"), "dev": Part("aclImdb/test", 25_000, "test")}
_ENTAILMENT = ("entailment", "not_entailment")
_TASKS = (
    _glue(
        "CoLA", (8_551, 1_043, 1_063), texts=("sentence",), metrics=("matthews",),
        headerless=("source", "label", "mark", "sentence"), check_labels=official.require_marks,
    ),
    _glue("SST-2", (67_349, 872, 1_821), texts=("sentence",)),
    _glue(
        "MRPC", (3_668, 408, 1_725), texts=("#1 String", "#2 String"), hub_texts=("sentence1", "sentence2"),
        label="Quality", metrics=("accuracy", "f1"),
    ),
    _glue(
        "STS-B", (5_749, 1_500, 1_379), kind="regression", label="score", labels=("0", "5"),
        metrics=("pearson", "spearman"),
    ),
    _glue(
        "QQP", (363_846, 40_430, 390_965), texts=("question1", "question2"), label="is_duplicate",
        metrics=("accuracy", "f1"), skip_short_rows=True,
    ),
    _glue(
        "MNLI", (392_702, 9_815), hub_texts=("premise", "hypothesis"), label="gold_label",
        labels=("entailment", "neutral", "contradiction"), check_labels=official.require_majority,
        parts=_MNLI_PARTS,
    ),
    _glue("QNLI", (104_743, 5_463, 5_463), texts=("question", "sentence"), labels=_ENTAILMENT),
    _glue("RTE", (2_490, 277, 3_000), labels=_ENTAILMENT),
    _glue("WNLI", (635, 71, 146)),
    Task(
        name="IMDb", hub=("stanfordnlp/imdb",), texts=("text",), labels=("neg", "pos"), metrics=("accuracy",),
        parts=_IMDB_PARTS, max_length=512,
    ),
    _squad("SQuAD", "rajpurkar/squad", "v1.1", (87_599, 10_570), no_answer=False),
    _squad("SQuAD2", "rajpurkar/squad_v2", "v2.0", (130_319, 11_873), no_answer=True),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
GLUE = tuple(name for name, task in TASKS.items() if task.hub[0] == _GLUE_ON_THE_HUB)
"""Names of the tasks of GLUE, whose mean score is the macro score."""
_GLUE_PARTS = [part for name in GLUE for part in TASKS[name].parts.values()]
TEST_FILES = tuple(f"{part.submission}.tsv" for part in _GLUE_PARTS if part.submission)
"""Names of the files that GLUE's server expects in a zip."""


def find_task(name: str) -> Task:
    """Returns the built-in task of this name, in any case. Raises UserError with the most similar name."""
    known = {key.lower(): task for key, task in TASKS.items()}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.4)
    hint = f"did you mean {known[near[0]].name}?" if near else f"known are {', '.join(TASKS)}"
    raise UserError(f"evaluation.tasks: no task is called {name!r}; {hint}")


def find_tasks(entries: Sequence[str | TaskSettings]) -> list[Task]:
    """Returns the tasks in the given order. An entry is a built-in task's name, a task file, or settings.

    Raises UserError for a wrong entry, and for a task that is named twice.
    """
    tasks = [_find(entry) for entry in entries]
    for position, task in enumerate(tasks):
        if task.name.lower() in [earlier.name.lower() for earlier in tasks[:position]]:
            raise UserError(f"evaluation.tasks: {task.name} is named twice; name it once")
    return tasks


def _find(entry: str | TaskSettings) -> Task:
    if isinstance(entry, str) and not is_file(entry):
        return find_task(entry)
    where = entry if isinstance(entry, str) else f"evaluation.tasks: {entry.name}"
    settings = read_file(entry) if isinstance(entry, str) else entry
    own.require_name(settings, where)
    own.require_numbers(settings, where)
    if settings.kind is not None:
        if settings.name.lower() in (name.lower() for name in TASKS):
            raise UserError(f"{where}: name: {settings.name} is a built-in task; choose another name")
        return own.own_task(settings, where)
    given = own.data_fields(settings)
    if given:
        raise UserError(
            f"{where}: {given[0]}: needs a kind, for example kind: classification; without a kind the entry"
            " changes hyper-parameters of a built-in task"
        )
    built_in = find_task(settings.name)
    length = settings.max_length or built_in.max_length
    return dataclasses.replace(built_in, settings=settings, max_length=length)
