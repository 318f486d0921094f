"""Scores of any model directory on named tasks, without a recipe."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from typing import Any

from evaluation import names
from evaluation.finetuning.jobs import GRID
from evaluation.finetuning.scores import Results, complete, macro, medians, prepare
from evaluation.models import Candidate, local_directory
from evaluation.submission import write_submission
from infra import console
from infra.errors import UserError
from infra.files import storage
from infra.files.locks import locked
from infra.settings.sections import Evaluation

SCORES = "scores"
TEACHER = "teacher"


def run_model(options: argparse.Namespace) -> int:
    """Fine-tune and score what is missing, print a line for each metric, write scores.json; the exit code."""
    settings = model_settings(options)
    directory = storage.join(options.output, SCORES)
    with contextlib.ExitStack() as stack:
        candidates, sources = _candidates(options, directory, stack)
        candidate = candidates[1 if options.teacher else 0]
        plan = prepare(
            candidates,
            settings,
            directory,
            keep_models=(candidate.name,) if options.keep_model else (),
            predict_test=options.submission,
        )
        for name, source in sources.items():
            names.keep_name(directory, source, name)
        for note in sorted(
            {note for parts in plan.splits.values() for one in parts.values() for note in one.notes}
        ):
            print(f"note: {note}", flush=True)
        results = complete(plan, settings.workers)
    for model, tasks in plan.choices().items():
        for task, points in tasks.items():
            columns = (*GRID, "dev_score")
            print(f"{model} {task}: settings by their score on dev, the best first")
            print(console.table([[f"{point[name]:g}" for name in columns] for point in points], columns))
    lines = _metric_lines(results)
    print(console.table(lines, ("model", "task", "metric", f"median of {len(settings.seeds)}", "all seeds")))
    if options.submission:
        target = storage.join(options.output, f"submission-{candidate.name}.zip")
        files = write_submission(plan, candidate.name, target)
        print(f"{target}: {', '.join(files)}" if files else "no test files: no submission")
    print(_add_scores(options.output, _summary(results)))
    return 0


def _candidates(
    options: argparse.Namespace, directory: str, stack: contextlib.ExitStack
) -> tuple[list[Candidate], dict[str, str]]:
    """The rows (the model, or teacher, model and taught model), and the sources of the first two by name.

    Names come from the command line, because the local copy of a remote model has another name each time.
    """
    source = names.source_of(options.model)
    own = [name for name in names.names_of(source) if not (options.teacher and name == TEACHER)]
    name = names.free_name(directory, source, own or [f"{TEACHER}-model"])
    model = stack.enter_context(local_directory(options.model))
    candidate = Candidate(name, model)
    if not options.teacher:
        return [candidate], {name: source}
    teacher_source = names.source_of(options.teacher)
    names.free_name(directory, teacher_source, [TEACHER])
    teacher = Candidate(TEACHER, stack.enter_context(local_directory(options.teacher)))
    taught = Candidate(f"{name} (D)", model, taught_by=TEACHER)
    return [teacher, candidate, taught], {TEACHER: teacher_source, name: source}


def _add_scores(output: str, scores: dict[str, Any]) -> str:
    """Publishes scores.json with these scores, and with those of other models and tasks that are there; its
    path."""
    path = storage.join(output, "scores.json")
    alone = (
        contextlib.nullcontext() if storage.is_remote(output) else locked(storage.join(output, storage.LOCK))
    )
    with alone:
        before = {}
        if storage.exists(path):
            with contextlib.suppress(UserError):  # damaged: the score files are what counts
                found = storage.read_json(path)
                before = found if isinstance(found, dict) else {}
        rows = {name: row for name, row in before.items() if isinstance(row, dict)}
        merged = {name: {**rows.get(name, {}), **tasks} for name, tasks in scores.items()}
        storage.publish_json(path, {**rows, **merged})
    return path


def model_settings(options: argparse.Namespace) -> Evaluation:
    """``Evaluation`` of the command line; UserError for a value that the section refuses."""
    fields = {field.name for field in dataclasses.fields(Evaluation)}  # options have the names of settings
    values = {name: value for name, value in vars(options).items() if name in fields and value is not None}
    values["tasks"] = tuple(name for name in options.tasks.split(",") if name)
    if options.temperature is not None:
        values["distillation_temperature"] = options.temperature
    if options.seeds is not None:
        values["seeds"] = tuple(range(options.seeds))
    try:
        return dataclasses.replace(Evaluation(), **values)
    except ValueError as error:
        name = str(error).removeprefix("distillation_").replace("_", "-", 1)
        raise UserError(f"--{name}") from None


def _metric_lines(results: Results) -> list[list[str]]:
    """One line a task and metric, in percent as the papers print them, and the macro score."""
    lines = []
    for model, tasks in results.items():
        for task, seeds in tasks.items():
            values = medians(seeds)
            for name in seeds[0]["metrics"]:
                each = "  ".join(f"{100 * seed['metrics'][name]:.2f}" for seed in seeds)
                lines.append([model, task, name, f"{100 * values[name]:.2f}", each])
        if len(tasks) > 1:
            lines.append(
                [
                    model,
                    "macro",
                    "",
                    f"{100 * macro({task: medians(seeds)['score'] for task, seeds in tasks.items()}):.2f}",
                    "",
                ]
            )
    return lines


def _summary(results: Results) -> dict[str, Any]:
    """``<candidate>.<task>``: medians; fractions."""
    return {name: {task: medians(seeds) for task, seeds in tasks.items()} for name, tasks in results.items()}
