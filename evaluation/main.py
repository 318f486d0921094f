"""Scores a recipe's teacher and students, or any models; measures latency and writes a report.

    python -m evaluation.main --recipe infra/recipes/demo.yaml [section.key=value ...]
    python -m evaluation.main --model DIR --tasks RTE,SST-2 --data GLUE_DIR --seeds 3 --epochs 3 --output DIR
    python -m evaluation.main --model tiny=DIR --model bert=OWNER/NAME --tasks RTE --output DIR
    python -m evaluation.main --model STUDENT_DIR --teacher DIR --tasks SST-2 --data GLUE_DIR --output DIR
    python -m evaluation.main export --model DIR --output DIR
    python -m evaluation.main export --web --model DIR --task SQuAD --output DIR

--model may be repeated; each model is a row of the report. With --teacher each model is also fine-tuned on
the outputs of the fine-tuned teacher, in the row "MODEL (D)". "export" writes ONNX files of a model, in
float32 and int8, or with --web a page that runs the model in a browser.
A command that was stopped resumes when it is run again; a finished command does nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from infra import console
from infra.errors import UserError
from infra.files.paths import expand_home, expand_home_in_uri
from infra.settings.recipe_file import load_recipe

_RECIPE_OPTIONS = ("recipe", "overrides", "submission")
"""Options that may be given with --recipe; all others need --model."""


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one tokenizer thread per worker
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["export"]:
        from evaluation.export_run import export_command

        return export_command(given[1:])
    options = _parse(given)
    if options.recipe:
        recipe = load_recipe(options.recipe, options.overrides)
        from evaluation.candidates.recipe_rows import require_students

        require_students(recipe, options.recipe)
        from evaluation.recipe_run import run_recipe

        return run_recipe(recipe, options.submission)
    if not options.tasks or not options.output:
        raise UserError("--model needs --tasks and --output")
    from evaluation.model_run import run_model

    return run_model(options)


def _grid(number: type) -> Callable[[str], Any]:
    """Returns an argparse type for a number, or for a comma-separated list of numbers."""

    def read(text: str) -> Any:
        values = tuple(number(value) for value in text.split(","))
        return values if len(values) > 1 else values[0]

    read.__name__ = number.__name__  # argparse's error messages use it
    return read


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    model = "directory, URL or hub name of a model, instead of a recipe; may be repeated"
    sentences = "number of sentences on which latency is measured (default 200; 0: all)"
    tracking = "URI of MLflow (default: a database in the output directory), or off"
    add("--recipe", type=expand_home, help="recipe file; overrides follow as section.key=value")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--model", type=expand_home, action="append", metavar="[NAME=]MODEL", help=model)
    add("--teacher", type=expand_home, help="directory or hub name of the teacher for a second distillation")
    add("--temperature", type=float, help="temperature of the second distillation (default 2)")
    add("--tasks", help="comma-separated names and task files: RTE,my/task.yaml")
    add("--data", type=expand_home, help="directory of official task files (default: datasets of the hub)")
    add("--seeds", type=int, help="number of random seeds: 0, 1, ... (default 1)")
    add("--epochs", type=_grid(float), help="number, or a list such as 3,5; the score on dev chooses")
    add("--max-steps", type=int, help="largest number of steps per run")
    add("--batch-size", type=_grid(int), help="number, or a list as for --epochs")
    add("--learning-rate", type=_grid(float), help="number, or a list as for --epochs")
    add("--max-length", type=int, help="tokens per row; IMDb and SQuAD have their own maximal length")
    add("--dtype", choices=("float32", "bfloat16"))
    add("--workers", type=int, help="number of fine-tuning runs in parallel")
    add("--keep-model", action="store_true", help="keep the fine-tuned model of the median seed")
    add("--latency-sentences", type=int, metavar="N", help=sentences)
    add("--tracking", type=expand_home_in_uri, metavar="URI", help=tracking)
    add("--submission", action="store_true", help="also write GLUE test predictions as a zip")
    add("--output", type=expand_home, help="directory in which scores and report are written")
    options = parser.parse_args(arguments)
    if bool(options.recipe) == bool(options.model):
        raise UserError("give either --recipe FILE or --model DIR")
    for_models = [name for name, value in vars(options).items() if value and name not in _RECIPE_OPTIONS]
    if options.recipe and for_models:
        flag = for_models[0].replace("_", "-")
        setting = "tracking.uri" if flag == "tracking" else f"evaluation.{for_models[0]}"
        raise UserError(f"--{flag}: needs --model; with a recipe write {setting}=...")
    if options.model and options.overrides:
        raise UserError(f"{options.overrides[0]}: overrides need --recipe")
    if options.temperature is not None and not options.teacher:
        raise UserError("--temperature: needs --teacher")
    return options


def cli() -> NoReturn:
    console.command(main)


if __name__ == "__main__":
    cli()
