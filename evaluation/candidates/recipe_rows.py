"""Collects the rows of a recipe's report: the teacher, all trained students, and their references.

This module imports no torch, so that a finished evaluation does not wait for it.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field

from evaluation.candidates.models import Candidate, local_directory
from evaluation.candidates.starts import start_key, start_of
from infra.errors import UserError
from infra.files import storage
from infra.files.cache import Cache
from infra.settings.recipe import Recipe, StudentRun
from infra.settings.sections import TERMS
from offline_teacher.store.paths import MANIFEST
from offline_teacher.store.records import decode
from offline_teacher.store.store import CACHE_BYTES, Store, open_store

TEACHER, UNDISTILLED, START = "teacher", "undistilled", "start"
"""Names of rows; with ``students``, a student's name follows ``undistilled`` and ``start``."""
RANDOM, MASKED_LM = "random", "masked LM alone"
"""Kinds of references, in addition to ``START``."""
_NOT_SHAPE = ("architectures", "dtype", "torch_dtype", "transformers_version")
"""Entries of a config.json that do not affect the encoder's shape."""


@dataclass
class Rows:
    """The models that an evaluation compares."""

    candidates: list[Candidate]
    """All models in the report's order: teacher, students, students with a second distillation, references,
    other models."""
    students: dict[str, StudentRun]
    """Row name -> trained student."""
    untrained: list[str]
    """Names of the recipe's students that are not trained yet."""
    references: dict[str, dict[str, str]] = field(default_factory=dict)
    """Student -> kind of reference -> name of the reference's row."""
    kl: dict[str, float] = field(default_factory=dict)
    """Student -> KL to the teacher at T = 1 on held-out text, measured when the student was trained."""
    notes: list[str] = field(default_factory=list)
    """Sentences about missing rows."""


def require_students(recipe: Recipe, path: str) -> None:
    """Raises UserError unless a student of the recipe is trained. ``path``: the recipe's file."""
    runs = recipe.runs()
    if not any(map(_is_trained, runs.values())):
        model = _model_directory(next(iter(runs.values())))
        raise UserError(f"{model}: is not trained yet; run student_train/main.py --recipe {path}")


def rows_of(recipe: Recipe, stack: ExitStack) -> Rows:
    """Returns the rows of a recipe. Local copies of remote models exist as long as ``stack`` is open.

    Raises UserError if ``evaluation.second_distillation`` is set and there is no teacher.
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
            remedy = "set it to false, or give teacher.model"
            raise UserError(f"evaluation.second_distillation: {without}; {remedy}")
        rows.notes.append(f"no row for the teacher: {without}")
    rows.notes += [f"no row for {name}: it is not trained" for name in rows.untrained]
    students = [
        Candidate(name, stack.enter_context(local_directory(_model_directory(run))), student=name)
        for name, run in trained.items()
    ]
    rows.candidates += students
    if settings.second_distillation:
        rows.candidates += [
            Candidate(f"{student.name} (D)", student.directory, taught_by=TEACHER, student=student.name)
            for student in students
        ]
    rows.references = {student.name: {} for student in students}
    rows.kl = {name: kl for name, run in trained.items() if (kl := _validation_kl(run)) is not None}
    if RANDOM in settings.references:
        _add_references(rows, RANDOM, _random_references(recipe, students))
    if START in settings.references:
        _add_references(rows, START, _start_references(recipe, rows, stack))
    _add_masked_lm_references(rows)
    for name, model in settings.models.items():
        rows.candidates.append(Candidate(name, stack.enter_context(local_directory(model))))
    return rows


def _add_references(rows: Rows, kind: str, reference_of: dict[str, Candidate]) -> None:
    """Adds references of one kind, each row once. ``reference_of``: student -> reference."""
    rows.candidates += {reference.name: reference for reference in reference_of.values()}.values()
    for student, reference in reference_of.items():
        rows.references[student][kind] = reference.name


def _random_references(recipe: Recipe, students: list[Candidate]) -> dict[str, Candidate]:
    """Returns student -> its architecture with random weights; students of one shape share a row."""
    by_key: dict[str, Candidate] = {}
    reference_of = {}
    for student in students:
        name = f"{UNDISTILLED} {student.name}" if recipe.students else UNDISTILLED
        reference = Candidate(name, student.directory, random_weights=True, student=student.name)
        reference_of[student.name] = by_key.setdefault(_shape_key(student.directory), reference)
    return reference_of


def _start_references(recipe: Recipe, rows: Rows, stack: ExitStack) -> dict[str, Candidate]:
    """Returns student -> the student before training. Students with the same initial weights share a row."""
    store = open_store(recipe.store_path)
    if not store.layout.teacher_weights:
        rows.notes.append(f"no row {START}: {_without_weights(recipe)}")
        return {}
    by_key: dict[str, Candidate] = {}
    reference_of = {}
    for name, run in rows.students.items():
        if run.student.init != "teacher":
            rows.notes.append(f"no row {START} for {name}: it starts from random weights (student.init)")
            continue
        key, title = start_key(run), f"{START} {name}" if recipe.students else START
        if key not in by_key:
            directory = storage.join(recipe.evaluation_dir, "start", name)
            by_key[key] = Candidate(title, start_of(run, store, directory, stack), student=name)
        reference_of[name] = by_key[key]
    return reference_of


def _add_masked_lm_references(rows: Rows) -> None:
    """Makes a student trained on masked LM alone a reference of others with its shape and number of steps."""
    shapes = {row.name: _shape_key(row.directory) for row in rows.candidates if row.name in rows.students}
    for name, run in rows.students.items():
        if not _is_masked_lm_alone(run):
            continue
        for other_name, other_run in rows.students.items():
            comparable = shapes[other_name] == shapes[name] and _steps(other_run) == _steps(run)
            if comparable and not _is_masked_lm_alone(other_run):
                rows.references[other_name][MASKED_LM] = name


def _is_masked_lm_alone(run: StudentRun) -> bool:
    return {term for term in TERMS if getattr(run.train, term)} == {"alpha_mlm"}


def _steps(run: StudentRun) -> tuple[float, int | None, int]:
    return run.train.epochs, run.train.max_steps, run.train.batch_size


def _shape_key(directory: str) -> str:
    """Returns a key that is equal for encoders of the same shape, with or without a masked-LM head."""
    config = storage.read_json(storage.join(directory, "config.json"))
    return json.dumps({key: config[key] for key in sorted(config) if key not in _NOT_SHAPE})


def _without_weights(recipe: Recipe) -> str:
    return f"the store {recipe.store_path} holds no weights of its teacher (store.teacher_weights: false)"


def _validation_kl(run: StudentRun) -> float | None:
    """Returns the KL at T = 1 that model.json records; None if it records none."""
    path = storage.join(run.directory, "model.json")
    if not storage.exists(path):
        return None
    try:
        value = decode(storage.read_bytes(path))["results"]["validation"].get("kl_t1")
    except (ValueError, KeyError, AttributeError):  # a damaged file does not prevent the evaluation
        return None
    return value if isinstance(value, float) else None


def _is_trained(run: StudentRun) -> bool:
    return storage.exists(storage.join(_model_directory(run), "config.json"))


def _model_directory(run: StudentRun) -> str:
    return storage.join(run.directory, "model")


def _teacher_directory(recipe: Recipe, stack: ExitStack) -> str | None:
    """Returns the teacher's model directory: from the store, else ``teacher.model``, else None."""
    has_store = storage.exists(storage.join(recipe.store_path, MANIFEST))
    if has_store or recipe.teacher is None:
        store = open_store(recipe.store_path)
        if store.layout.teacher_weights:
            return _write_teacher(store, stack.enter_context(tempfile.TemporaryDirectory()))
    if recipe.teacher is None:
        return None
    return stack.enter_context(local_directory(recipe.teacher.model, recipe.teacher.revision))


def _write_teacher(store: Store, directory: str) -> str:
    """Writes the store's teacher to ``directory``: tokenizer, configuration and a link to the weights.
    Returns ``directory``."""
    for name, data in store.tokenizer_files().items():
        storage.publish_bytes(storage.join(directory, name), data)
    storage.publish_json(storage.join(directory, "config.json"), store.teacher_config())
    cache = Cache(storage.join(directory, ".cache"), CACHE_BYTES)
    os.symlink(os.path.abspath(store.teacher_weights(cache)), storage.join(directory, "model.safetensors"))
    return directory
