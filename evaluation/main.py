"""Scores, latency and a report: of a recipe's teacher and student, or of any model directory.

    python -m evaluation.main --recipe infra/recipes/demo.yaml [section.key=value ...]
    python -m evaluation.main --model DIR --tasks RTE,SST-2 --data GLUE_DIR --seeds 3 --epochs 3 --output DIR
    python -m evaluation.main --model STUDENT_DIR --teacher DIR --tasks SST-2 --data GLUE_DIR --output DIR
    python -m evaluation.main export --model DIR --output DIR

With --teacher the model also learns, as "(D)", from the outputs of the fine-tuned teacher. The last command
writes a (fine-tuned) model directory as ONNX, int8 ONNX and ORT format for devices.
Run again, all continue where they stopped and do nothing when everything is there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from evaluation.models import Candidate, local_directory
from evaluation.scores import Results, complete, macro, medians, prepare, write_submission
from evaluation.tasks import find_tasks
from infra import console, storage
from infra.errors import UserError
from infra.sections import Evaluation

SCORES = "scores"
_SETTINGS = ("data", "epochs", "max_steps", "batch_size", "learning_rate", "max_length", "dtype", "workers")
_MODEL_OPTIONS = ("tasks", "seeds", "keep_model", "output", "teacher", "temperature", *_SETTINGS)


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one tokenizer thread a worker
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["export"]:
        return _export(given[1:])
    options = _parse(given)
    if options.recipe:
        from evaluation.recipe_run import run_recipe

        return run_recipe(options.recipe, options.overrides, options.submission)
    return _run_model(options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", help="recipe file; overrides follow as section.key=value")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--model", help="model directory or hub name, instead of a recipe")
    parser.add_argument("--teacher", help="directory or hub name: second distillation from it, fine-tuned")
    parser.add_argument("--temperature", type=float, help="of the second distillation (default 2)")
    parser.add_argument("--tasks", help="comma-separated, for example RTE,SST-2")
    parser.add_argument("--data", help="directory of official task files; without it the hub's are read")
    parser.add_argument("--seeds", type=int, help="this many seeds: 0, 1, ... (default 1)")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--max-steps", type=int, help="stop a run after this many steps")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--max-length", type=int, help="tokens; IMDb and SQuAD have their own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--workers", type=int, help="fine-tuning runs side by side")
    parser.add_argument(
        "--keep-model", action="store_true", help="keep the fine-tuned model of the median seed"
    )
    parser.add_argument("--submission", action="store_true", help="also write GLUE test predictions as a zip")
    parser.add_argument("--output", help="directory of the scores")
    options = parser.parse_args(arguments)
    if bool(options.recipe) == bool(options.model):
        raise UserError("give either --recipe FILE or --model DIR")
    loose = [name for name in _MODEL_OPTIONS if getattr(options, name)]
    if options.recipe and loose:
        flag = loose[0].replace("_", "-")
        raise UserError(f"--{flag}: goes with --model; with a recipe write evaluation.{loose[0]}=...")
    if options.model and options.overrides:
        raise UserError(f"{options.overrides[0]}: overrides go with --recipe")
    if options.temperature is not None and not options.teacher:
        raise UserError("--temperature: goes with --teacher")
    return options


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.main export", description="Write a model directory as files for devices."
    )
    parser.add_argument("--model", required=True, help="directory or hub name, fine-tuned or an encoder")
    parser.add_argument("--output", required=True, help="directory of the ONNX and ORT files")
    return parser


def _export(arguments: Sequence[str]) -> int:
    options = _export_parser().parse_args(arguments)
    from evaluation.export import export

    require_writable(options.output)
    with local_directory(options.model) as model:
        summary = export(model, options.output)
    lines = [[name, f"{size / 1e6:.2f} MB"] for name, size in summary["bytes"].items()]
    print(console.table(lines, ("file", "size")))
    difference = summary["difference"]
    print(
        f"largest difference from torch: float32 {difference['float32']:.1e}, int8 {difference['int8']:.1e}"
    )
    print(storage.join(options.output, "export.json"))
    return 0


def _run_model(options: argparse.Namespace) -> int:
    if not options.tasks or not options.output:
        raise UserError("--model needs --tasks and --output")
    settings = model_settings(options)
    directory = storage.join(options.output, SCORES)
    require_writable(options.output)
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
    values: dict[str, Any] = {name: getattr(options, name) for name in _SETTINGS}
    values = {name: value for name, value in values.items() if value is not None}
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


def require_writable(directory: str) -> None:
    """UserError at once, not after hours, where the output cannot be written."""
    probe = storage.join(directory, "writable")
    storage.publish_bytes(probe, b"")
    storage.remove(probe)


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


if __name__ == "__main__":
    console.command(main)
