"""The rows of a recipe's report: the teacher, every trained student, and what students are compared with.

This module imports no torch, so that a finished evaluation answers without it.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field

from evaluation.models import Candidate, local_directory
from evaluation.starts import shape_of, start_of
from infra.errors import UserError
from infra.files import storage
from infra.files.cache import Cache
from infra.settings.recipe import Recipe, StudentRun
from infra.settings.sections import TERMS
from offline_teacher.store.paths import MANIFEST
from offline_teacher.store.reader import CACHE_BYTES, Store, open_store
from offline_teacher.store.records import decode

TEACHER, UNDISTILLED, START = "teacher", "undistilled", "start"
"""Names of rows. If the recipe has ``students``, the student's name follows ``undistilled`` and ``start``."""
RANDOM, MASKED_LM = "random", "masked LM alone"
"""Kinds of references, beside ``START``."""
_NO_ARCHITECTURE = ("architectures", "dtype", "torch_dtype", "transformers_version")
"""Entries of a config.json that do not affect the encoder's shape."""


@dataclass
class Rows:
    """What a recipe's evaluation compares."""

    candidates: list[Candidate]
    """In the order of the report: teacher, students, taught students, references, other models."""
    students: dict[str, StudentRun]
    """The trained ones, by the names of their rows."""
    untrained: list[str]
    """Names of the recipe's students that are not there yet."""
    references: dict[str, dict[str, str]] = field(default_factory=dict)
    """Student -> kind of reference -> its row."""
    kl: dict[str, float] = field(default_factory=dict)
    """Student -> KL to the teacher on held-out text, as its training measured it."""
    notes: list[str] = field(default_factory=list)


def require_students(recipe: Recipe, path: str) -> None:
    """UserError unless one of the recipe's students is there; ``path``: the recipe's file."""
    runs = recipe.runs()
    if not any(map(_is_trained, runs.values())):
        model = _model(next(iter(runs.values())))
        raise UserError(f"{model}: no student yet; train it with student_train/main.py --recipe {path}")


def rows_of(recipe: Recipe, stack: ExitStack) -> Rows:
    """The rows, with local copies of remote models for as long as ``stack`` is open.

    UserError where a second distillation is asked for and there is no teacher to learn from.
    """
    runs, settings = recipe.runs(), recipe.evaluation
    trained = {name: run for name, run in runs.items() if _is_trained(run)}
    rows = Rows([], trained, [name for name in runs if name not in trained])
    teacher = _teacher_directory(recipe, stack)
    if teacher is not None:
        rows.candidates.append(Candidate(TEACHER, teacher))
    else:
        without = _without_weights(recipe)
        if settings.second_distillation:
            raise UserError(
                f"evaluation.second_distillation: {without}; set it to false, or give teacher.model"
            )
        rows.notes.append(f"no row for the teacher: {without}")
    rows.notes += [f"no row for {name}: it is not trained" for name in rows.untrained]
    students = [
        Candidate(name, stack.enter_context(local_directory(_path_not_name(_model(run)))), student=name)
        for name, run in trained.items()
    ]
    rows.candidates += students
    if settings.second_distillation:
        rows.candidates += [
            Candidate(f"{one.name} (D)", one.directory, taught_by=TEACHER, student=one.name)
            for one in students
        ]
    rows.references = {one.name: {} for one in students}
    rows.kl = {name: kl for name, run in trained.items() if (kl := _validation_kl(run)) is not None}
    if RANDOM in settings.references:
        _add_references(rows, RANDOM, _undistilled(recipe, students))
    if START in settings.references:
        _add_references(rows, START, _starts(recipe, rows, stack))
    _name_masked_lm_alone(rows)
    rows.candidates += [
        Candidate(name, stack.enter_context(local_directory(model)))
        for name, model in settings.models.items()
    ]
    return rows


def _add_references(rows: Rows, kind: str, found: dict[str, Candidate]) -> None:
    """Add the rows that students are compared with, each once."""
    rows.candidates += {one.name: one for one in found.values()}.values()
    for student, one in found.items():
        rows.references[student][kind] = one.name


def _undistilled(recipe: Recipe, students: list[Candidate]) -> dict[str, Candidate]:
    """Student -> the row of its architecture with random weights, one row for students of one shape."""
    by_shape: dict[str, Candidate] = {}
    found = {}
    for one in students:
        name = f"{UNDISTILLED} {one.name}" if recipe.students else UNDISTILLED
        shape = Candidate(name, one.directory, random_weights=True, student=one.name)
        found[one.name] = by_shape.setdefault(_shape(one.directory), shape)
    return found


def _starts(recipe: Recipe, rows: Rows, stack: ExitStack) -> dict[str, Candidate]:
    """Student -> the row of what it was before its training, one row for students that start alike."""
    store = open_store(recipe.store_path)
    if not store.layout.teacher_weights:
        rows.notes.append(f"no row {START}: {_without_weights(recipe)}")
        return {}
    by_shape: dict[str, Candidate] = {}
    found = {}
    for name, run in rows.students.items():
        if run.student.init != "teacher":
            rows.notes.append(f"no row {START} for {name}: it starts from random weights (student.init)")
            continue
        key, title = shape_of(run), f"{START} {name}" if recipe.students else START
        if key not in by_shape:
            directory = storage.join(recipe.evaluation_dir, "start", name)
            by_shape[key] = Candidate(title, start_of(run, store, directory, stack), student=name)
        found[name] = by_shape[key]
    return found


def _name_masked_lm_alone(rows: Rows) -> None:
    """A student of masked LM alone is a reference for every student of its shape and number of steps."""
    shapes = {one.name: _shape(one.directory) for one in rows.candidates if one.name in rows.students}
    for name, run in rows.students.items():
        if not _is_masked_lm_alone(run):
            continue
        for other, another in rows.students.items():
            alike = shapes[other] == shapes[name] and _steps(another) == _steps(run)
            if alike and not _is_masked_lm_alone(another):
                rows.references[other][MASKED_LM] = name


def _is_masked_lm_alone(run: StudentRun) -> bool:
    return {term for term in TERMS if getattr(run.train, term)} == {"alpha_mlm"}


def _steps(run: StudentRun) -> tuple[float, int | None, int]:
    return run.train.epochs, run.train.max_steps, run.train.batch_size


def _shape(directory: str) -> str:
    """A key that is equal for students of the same encoder shape, with or without a masked-LM head."""
    config = storage.read_json(storage.join(directory, "config.json"))
    return json.dumps({key: config[key] for key in sorted(config) if key not in _NO_ARCHITECTURE})


def _without_weights(recipe: Recipe) -> str:
    return f"the store {recipe.store_path} holds no weights of its teacher (store.teacher_weights: false)"


def _validation_kl(run: StudentRun) -> float | None:
    """From the file beside the model; None where there is none, or where no KL was measured."""
    path = storage.join(run.directory, "model.json")
    if not storage.exists(path):
        return None
    try:
        value = decode(storage.read_bytes(path))["results"]["validation"].get("kl")
    except (ValueError, KeyError, AttributeError):  # damaged: the model is what is evaluated
        return None
    return value if isinstance(value, float) else None


def _is_trained(run: StudentRun) -> bool:
    return storage.exists(storage.join(_model(run), "config.json"))


def _model(run: StudentRun) -> str:
    return storage.join(run.directory, "model")


def _path_not_name(path: str) -> str:
    """A relative local path marked as one, so that it is not taken for a hub name."""
    return path if storage.is_remote(path) or path.startswith(("/", ".")) else f"./{path}"


def _teacher_directory(recipe: Recipe, stack: ExitStack) -> str | None:
    """The teacher as a model directory: the store's, else the recipe's ``teacher.model``, else None."""
    there = storage.exists(storage.join(recipe.store_path, MANIFEST))
    if there or recipe.teacher is None:
        store = open_store(recipe.store_path)
        if store.layout.teacher_weights:
            return _teacher_of(store, stack.enter_context(tempfile.TemporaryDirectory()))
    if recipe.teacher is None:
        return None
    return stack.enter_context(local_directory(recipe.teacher.model, recipe.teacher.revision))


def _teacher_of(store: Store, directory: str) -> str:
    """``directory`` with the store's tokenizer, configuration and weights, the latter by a link."""
    for name, data in store.tokenizer_files().items():
        storage.publish_bytes(storage.join(directory, name), data)
    storage.publish_json(storage.join(directory, "config.json"), store.teacher_config())
    cache = Cache(storage.join(directory, ".cache"), CACHE_BYTES)
    weights = os.path.abspath(store.teacher_weights(cache))
    os.symlink(weights, storage.join(directory, "model.safetensors"))
    return directory
