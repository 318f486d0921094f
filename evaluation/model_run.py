"""Evaluates any models on named tasks, without a recipe: the command with ``--model``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
from contextlib import ExitStack
from typing import Any

from evaluation.candidates import names
from evaluation.candidates.models import Candidate, local_directory
from evaluation.candidates.recipe_rows import TEACHER, Rows
from evaluation.evaluate import evaluate
from evaluation.finetuning.jobs import GRID
from evaluation.finetuning.scores import prepare
from evaluation.report import tables
from infra import console
from infra.errors import UserError
from infra.files import storage
from infra.files.locks import locked
from infra.files.paths import expand_home
from infra.settings.recipe import Recipe, StudentRun
from infra.settings.recipe_file import refuse_credentials
from infra.settings.sections import Evaluation, Tracking, is_name

SCORES = "scores"
"""Name of the folder of score files in the output directory."""
OFF = "off"
"""Value of ``--tracking`` for no tracking."""
LATENCY_SENTENCES = 200
"""Default number of sentences on which latency is measured."""


class Comparison(Recipe):
    """The settings of a command without a recipe, in the form of a recipe without students.

    All files are in the output directory.
    """

    @property
    def root(self) -> str:
        return self.output

    @property
    def evaluation_dir(self) -> str:
        return self.output

    def runs(self) -> dict[str, StudentRun]:
        return {}


def run_model(options: argparse.Namespace) -> int:
    """Runs the unfinished jobs, writes scores.json and the report of all models; returns the exit code."""
    comparison = comparison_of(options)
    directory = storage.join(options.output, SCORES)
    with contextlib.ExitStack() as stack:
        sources = _named_sources(options, directory)
        rows = Rows(_candidates(sources, bool(options.teacher), stack), {}, [])
        models = [name for name in sources if not (options.teacher and name == TEACHER)]
        plan = prepare(
            rows.candidates,
            comparison.evaluation,
            directory,
            keep_models=models if options.keep_model else (),
            predict_test=options.submission,
        )
        for name, source in sources.items():
            names.record_name(directory, names.source_of(source), name)
        notes = {note for splits in plan.splits.values() for split in splits.values() for note in split.notes}
        for note in sorted(notes):
            print(f"note: {note}", flush=True)
        content = evaluate(comparison, rows, plan, models if options.submission else ())
    _show(content)
    print(_add_scores(options.output, {name: row["scores"] for name, row in content["rows"].items()}))
    print(storage.join(options.output, "report.html"))
    return 0


def comparison_of(options: argparse.Namespace) -> Comparison:
    """Returns the settings of the command line. Raises UserError for a wrong value and for credentials."""
    fields = {field.name for field in dataclasses.fields(Evaluation)}  # options have the names of settings
    values = {name: value for name, value in vars(options).items() if name in fields and value is not None}
    values["tasks"] = tuple(name for name in options.tasks.split(",") if name)
    if options.temperature is not None:
        values["distillation_temperature"] = options.temperature
    if options.seeds is not None:
        values["seeds"] = tuple(range(options.seeds))
    models = [_name_and_source(text)[1] for text in options.model]
    try:
        refuse_credentials({**vars(options), "model": models})
        settings = dataclasses.replace(Evaluation(latency_sentences=LATENCY_SENTENCES), **values)
    except ValueError as error:
        name, colon, rest = str(error).removeprefix("distillation_").partition(":")
        raise UserError(f"--{name.replace('_', '-')}{colon}{rest}") from None
    title = re.sub(r"[^A-Za-z0-9._-]", "", os.path.basename(os.path.abspath(options.output))).lstrip("._-")
    name, tracking = title[:100] or SCORES, Tracking(enabled=options.tracking != OFF, uri=options.tracking)
    return Comparison(name=name, output=options.output, evaluation=settings, tracking=tracking)


def _named_sources(options: argparse.Namespace, directory: str) -> dict[str, str]:
    """Returns row name -> path, URL or hub name of the model, in the given order, the teacher first.

    A model without a given name gets a name made of its path, URL or hub name. ``directory``: the folder of
    score files. Raises UserError for a name that is not allowed, given twice, or another model's.
    """
    given = [_name_and_source(text) for text in options.model]
    if options.teacher:
        given.insert(0, (TEACHER, options.teacher))
    given_names = [name for name, _ in given if name]
    twice = next((name for name in given_names if given_names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--model: {twice} is the name of two models; write another name before the =")
    sources: dict[str, str] = {}
    for name, source in given:
        identity = names.source_of(source)
        taken = {*given_names, *sources, TEACHER}
        possible = [candidate for candidate in names.names_of(identity) if candidate not in taken]
        chosen = names.free_name(directory, identity, [name] if name else possible or [f"{TEACHER}-model"])
        sources[chosen] = source
    return sources


def _name_and_source(given: str) -> tuple[str, str]:
    """Splits ``NAME=MODEL``. The name is "" if only a model is given, whose path may contain a ``=``."""
    name, equals, source = given.partition("=")
    if not equals or "/" in name or os.path.exists(given):
        return "", given
    if not is_name(name):
        allowed = "letters, digits, dots, dashes and underscores"
        raise UserError(f"--model: a name is {allowed}, not {name!r}; write --model NAME=DIR")
    if not source:
        raise UserError(f"--model: {name}= names no model; write --model {name}=DIR")
    return name, expand_home(source)


def _candidates(sources: dict[str, str], second_distillation: bool, stack: ExitStack) -> list[Candidate]:
    """Returns a row per model and, with a second distillation, another row per model except the teacher."""
    rows = [Candidate(name, stack.enter_context(local_directory(source))) for name, source in sources.items()]
    if second_distillation:
        rows += [
            Candidate(f"{row.name} (D)", row.directory, taught_by=TEACHER, student=row.name)
            for row in rows
            if row.name != TEACHER
        ]
    return rows


def _show(content: dict[str, Any]) -> None:
    """Prints the grids with their scores on dev, every metric, and the summary."""
    for model, tasks in content["choices"].items():
        for task, points in tasks.items():
            columns = (*GRID, "dev_score")
            print(f"{model} {task}: hyper-parameters by their score on dev, the best first")
            print(console.table([[f"{point[name]:g}" for name in columns] for point in points], columns))
    header, lines = tables.metric_rows(content)
    print(console.table(lines, header), end="\n\n")
    print(tables.summary_table(content))


def _add_scores(output: str, scores: dict[str, Any]) -> str:
    """Adds scores (model -> task -> score) to scores.json, which keeps those of other models and tasks.

    Returns the path of scores.json.
    """
    path = storage.join(output, "scores.json")
    lock = locked(storage.join(output, storage.LOCK)) if not storage.is_remote(output) else None
    with lock or contextlib.nullcontext():
        before = storage.read_object(path)  # a damaged file is replaced; the score files are kept
        rows = {name: row for name, row in before.items() if isinstance(row, dict)}
        merged = {name: {**rows.get(name, {}), **tasks} for name, tasks in scores.items()}
        storage.publish_json(path, {**rows, **merged})
    return path
