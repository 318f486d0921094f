"""A user's own task: makes a ``Task`` from the user's settings, and reads its examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from evaluation.kinds.registry import KINDS
from evaluation.tasks import examples
from evaluation.tasks.answer_spans import Question, align_answers, read_questions
from evaluation.tasks.beir import read_corpus, read_queries
from evaluation.tasks.row_files import TAGS, WORDS, Rows, format_of, hub_url, read_hub, read_rows
from evaluation.tasks.task import Part, Split, Task
from infra.errors import UserError
from infra.files.paths import expand_home
from infra.recipe_words import with_nearest_name
from infra.settings.sections import grid_values, is_name
from infra.settings.sections.task_settings import PATHS, TaskSettings

_COLUMNS = {"tokens": (1,), "similarity": (2,), "spans": (0, 2), "retrieval": (0,)}
"""Kind -> allowed numbers of text columns; other kinds take 1 or 2."""
_CLASSES = ("classification", "multilabel", "tokens")
"""Kinds whose labels are classes."""
_UNLABELLED = ("spans", "retrieval")
"""Kinds without a label column."""


def own_task(settings: TaskSettings, where: str) -> Task:
    """Returns the task of these settings. Reads the training examples if the settings list no labels.

    Raises UserError, which starts with ``where``, for settings that contradict each other.
    """
    _require_consistent(settings, where)
    kind = KINDS[settings.kind or ""]
    conll = settings.kind == "tokens" and not settings.text and _is_conll(settings)
    texts = (WORDS,) if conll else settings.text
    if settings.kind == "spans" and not texts:
        texts = ("question", "context")
    metrics = settings.metrics or kind.metrics
    task = Task(
        name=settings.name,
        kind=settings.kind or "classification",
        texts=texts,
        label=TAGS if conll and settings.label is None else settings.label or "",
        labels=settings.labels,
        # Classification computes only its first metric unless the user lists some.
        metrics=metrics if settings.metrics or settings.kind != "classification" else metrics[:1],
        own_main_metrics=metrics[:1],
        parts={name: Part("", None, "") for name in _split_names(settings)},
        max_length=settings.max_length,
        settings=settings,
    )
    if settings.kind in _CLASSES and not settings.labels:
        task = dataclasses.replace(task, labels=examples.labels_in(task, _rows_of(task, "train")))
    if settings.kind == "classification" and "f1" in task.metrics and len(task.labels) != 2:
        raise UserError(
            f"{where}: metrics: f1 is the F1 of the second label and needs exactly two labels, but there"
            f" are {len(task.labels)}; write macro_f1"
        )
    if settings.kind == "spans":
        questions = [question for split_name in task.parts for question in _questions(settings, split_name)]
        task = dataclasses.replace(task, no_answer=any(not question.answers for question in questions))
    return task


def _split_names(settings: TaskSettings) -> list[str]:
    """Returns the names of the splits. If there is no file for dev, dev is divided off train."""
    if not KINDS[settings.kind or ""].fine_tuned:
        return ["test" if settings.test else "dev"]
    return ["train", "dev", *(["test"] if settings.test else [])]


def _is_conll(settings: TaskSettings) -> bool:
    path = settings.train or settings.test or settings.dev or ""
    return settings.hub is None and format_of(path, settings.format) == "conll"


def _require_consistent(settings: TaskSettings, where: str) -> None:
    """Raises UserError for the first setting that is missing, out of range, or not for this kind."""

    def require(condition: bool, sentence: str) -> None:
        if not condition:
            raise UserError(f"{where}: {sentence}")

    kind, count = settings.kind, len(settings.text)
    assert kind is not None
    data = (settings.train, settings.dev, settings.test)
    allowed = _COLUMNS.get(kind, (1, 2))
    columns_are_fixed = kind == "tokens" and count == 0 and any(data) and _is_conll(settings)
    if not columns_are_fixed:
        numbers = " or ".join(map(str, allowed))
        require(count in allowed, f"text: {kind} takes {numbers} columns of text, not {count}")
        needs_label = kind not in _UNLABELLED
        example = "tags" if kind == "tokens" else "label"
        require(not needs_label or settings.label is not None, f"label: is required, for example {example}")
    unlabelled = kind in _UNLABELLED
    require(not unlabelled or settings.label is None, f"label: {kind} has no column of labels; leave it out")
    if KINDS[kind].fine_tuned:
        require(settings.train is not None, "train: is required, for example train: train.csv")
    else:
        require(settings.train is None, f"train: {kind} scores a model without training; give dev or test")
        require(any(data), "test: dev or test is required, for example test: test.tsv")
    for name in ("corpus", "queries"):
        given = getattr(settings, name) is not None
        if kind == "retrieval":
            require(given, f"{name}: is required, for example {name}: {name}.jsonl")
        else:
            require(not given, f"{name}: is for kind: retrieval, not {kind}; leave it out")
    require(not settings.labels or kind in _CLASSES, f"labels: {kind} has no classes; leave it out")
    require(len(settings.labels) != 1, "labels: names one class; there must be two or more")
    twice = next((label for label in settings.labels if settings.labels.count(label) > 1), None)
    require(twice is None, f"labels: {twice!r} is named twice; name it once")
    fraction, on_hub = settings.dev_fraction, settings.hub is not None
    require(0 < fraction <= 0.5, f"dev_fraction: must be > 0 and <= 0.5, not {fraction}")
    require(settings.split_seed >= 0, f"split_seed: must be >= 0, not {settings.split_seed}")
    has_format = settings.format is not None
    require(not (on_hub and has_format), "format: is for files, not for a hub dataset; leave it out")
    for name in ("config", "revision"):
        given = getattr(settings, name) is not None
        require(on_hub or not given, f"{name}: is for a hub dataset; leave it out")
    known = list(KINDS[kind].metrics)
    for metric in settings.metrics:
        message = with_nearest_name(f"metrics: {kind} has no metric {metric!r}", metric, known)
        require(metric in known, message)


def load_own(task: Task, split_name: str) -> Split:
    """Returns the examples of a split. Raises UserError for a missing column or a wrong value."""
    settings = task.own
    assert settings is not None
    if settings.kind == "spans":
        kept, notes = align_answers(
            _questions(settings, split_name), _source(settings, split_name), task.no_answer
        )
        split = Split([], None, questions=_questions_of_split(settings, split_name, kept), notes=notes)
    elif settings.kind == "retrieval":
        corpus = read_corpus(expand_home(settings.corpus or ""))
        split = read_queries(expand_home(settings.queries or ""), _source(settings, split_name), corpus)
    else:
        split = examples.split_of(task, _rows_of(task, split_name))
    if len(split) == 0:
        raise UserError(f"{_source(settings, split_name)}: no examples for {split_name} of {settings.name}")
    return split


def _source(settings: TaskSettings, split_name: str) -> str:
    path = str(getattr(settings, split_name) or settings.train)
    return path if settings.hub is not None else expand_home(path)


def own_location(settings: TaskSettings, split_name: str) -> str:
    """Returns where a split's examples are: a path, a URL, or ``hf://datasets/`` and the hub's name."""
    if settings.hub is not None:
        return hub_url(settings.hub, settings.revision)
    return _source(settings, split_name)


def _rows_of(task: Task, split_name: str) -> Rows:
    settings = task.own
    assert settings is not None
    rows = _read(settings, getattr(settings, split_name) or settings.train or "")
    if split_name == "test" or settings.dev is not None or not KINDS[task.kind].fine_tuned:
        return rows
    groups = rows.column(task.label) if task.kind == "classification" else [None] * len(rows)
    return rows.select(divide([str(group) for group in groups], settings)[split_name])


@lru_cache(maxsize=4)
def _read(settings: TaskSettings, name: str) -> Rows:
    if settings.hub is not None:
        return read_hub(settings.hub, settings.config, name, settings.revision)
    return read_rows(expand_home(name), settings.format)


def divide(groups: Sequence[str], settings: TaskSettings) -> dict[str, list[int]]:
    """Divides rows at random, with ``split_seed``; returns the row numbers of ``train`` and of ``dev``.

    ``groups``: a group per row, such as its label; dev has the same fraction of every group. Raises UserError
    if train or dev would be empty.
    """
    generator = np.random.default_rng(settings.split_seed)
    dev: list[int] = []
    for group in sorted(set(groups)):
        rows = np.flatnonzero(np.asarray(groups, object) == group)
        count = max(1, round(settings.dev_fraction * len(rows))) if len(rows) > 1 else 0
        dev += generator.permutation(rows)[:count].tolist()
    chosen = set(dev)
    train = [row for row in range(len(groups)) if row not in chosen]
    if not chosen or not train:
        remedy = "set dev to a separate file"
        raise UserError(f"{settings.name}: too few examples for a validation split; {remedy}")
    return {"train": train, "dev": sorted(chosen)}


@lru_cache(maxsize=4)
def _all_questions(settings: TaskSettings, name: str) -> tuple[Question, ...]:
    if settings.hub is None and format_of(name, settings.format) == "squad":
        return tuple(read_questions(expand_home(name), no_answer=True))
    columns = settings.text or ("question", "context")
    return tuple(examples.questions_in(_read(settings, name), columns, settings.id))


def _questions(settings: TaskSettings, split_name: str) -> Sequence[Question]:
    return _all_questions(settings, getattr(settings, split_name) or settings.train or "")


def _questions_of_split(settings: TaskSettings, split_name: str, questions: list[Question]) -> list[Question]:
    """Returns the questions of this split. All questions of a context are in the same split."""
    if split_name == "test" or settings.dev is not None:
        return questions
    contexts = list(dict.fromkeys(question.context for question in questions))
    chosen = divide([""] * len(contexts), settings)[split_name]
    kept = {contexts[number] for number in chosen}
    return [question for question in questions if question.context in kept]


def require_name(settings: TaskSettings, where: str) -> None:
    """Raises UserError unless the name can name a folder, because each task has a folder of its name."""
    if not is_name(settings.name):
        allowed = "letters, digits, dots, dashes and underscores, at most 100, the first a letter or digit"
        raise UserError(f"{where}: name: must be {allowed}, not {settings.name!r}")


def require_numbers(settings: TaskSettings, where: str) -> None:
    """Raises UserError for a hyper-parameter out of range."""
    for name in ("epochs", "learning_rate", "batch_size", "max_steps"):
        values = grid_values(getattr(settings, name))
        if not values:
            raise UserError(f"{where}: {name}: the list is empty; give a value")
        wrong = next((number for number in values if number is not None and number <= 0), None)
        if wrong is not None:
            raise UserError(f"{where}: {name}: must be > 0, not {wrong}")
    if settings.max_length is not None and settings.max_length < 8:
        raise UserError(f"{where}: max_length: must be >= 8, not {settings.max_length}")


def data_fields(settings: TaskSettings) -> list[str]:
    """Returns the names of the settings that the user gave and that only an own task may have."""
    names = (*PATHS, "hub", "config", "format", "text", "label", "labels", "id", "metrics")
    return [name for name in names if getattr(settings, name)]
