"""Scores of any model directory on named tasks, without a recipe."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from typing import Any

from evaluation.models import Candidate, local_directory
from evaluation.scores import Results, complete, macro, medians, prepare, write_submission
from evaluation.tasks import find_tasks
from infra import console, storage
from infra.errors import UserError
from infra.sections import Evaluation

SCORES = "scores"


def run_model(options: argparse.Namespace) -> int:
    """Fine-tune and score what is missing, print a line for each metric, write scores.json; the exit code."""
    settings = model_settings(options)
    directory = storage.join(options.output, SCORES)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(local_directory(options.model))
        candidate = Candidate(os.path.basename(os.path.abspath(model)), model)
        candidates = [candidate]
        if options.teacher:
            teacher = Candidate("teacher", stack.enter_context(local_directory(options.teacher)))
            taught = Candidate(f"{candidate.name} (D)", model, taught_by=teacher.name)
            if candidate.name == teacher.name:
                raise UserError(f"--model: {model} is called teacher; give its directory another name")
            candidates = [teacher, candidate, taught]
        plan = prepare(
            candidates,
            settings,
            directory,
            keep_models=(candidate.name,) if options.keep_model else (),
            predict_test=options.submission,
        )
        results = complete(plan, settings.workers)
    lines = _metric_lines(results)
    print(console.table(lines, ("model", "task", "metric", f"median of {len(settings.seeds)}", "all seeds")))
    for note in sorted(
        {note for seeds in results[candidate.name].values() for one in seeds for note in one["notes"]}
    ):
        print(f"note: {note}")
    if options.submission:
        target = storage.join(options.output, "submission.zip")
        names = write_submission(candidate, results, directory, target)
        print(f"{target}: {', '.join(names)}" if names else "no test files: no submission")
    storage.publish_json(storage.join(options.output, "scores.json"), _summary(results))
    print(storage.join(options.output, "scores.json"))
    return 0


def model_settings(options: argparse.Namespace) -> Evaluation:
    """``Evaluation`` of the command line; UserError for a value that the section refuses."""
    fields = {field.name for field in dataclasses.fields(Evaluation)}  # options have the names of settings
    values = {name: value for name, value in vars(options).items() if name in fields and value is not None}
    values["tasks"] = tuple(
        task.name for task in find_tasks([name for name in options.tasks.split(",") if name])
    )
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
