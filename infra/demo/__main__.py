"""``python -m infra.demo``: writes the inputs, runs the three stage commands, and shows what came out."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from infra import console
from infra.cpu.processor import computes_bfloat16
from infra.demo.inputs import write_inputs
from infra.demo.result import result_table
from infra.demo.stage import run_stage
from infra.files import storage
from infra.settings.recipe_file import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
RANKS = 2
say = partial(print, flush=True)
NEXT = """Look at {recipe.evaluation_dir}/retention.png, then at
  {recipe.evaluation_dir}/report.html                   every metric, latency, int8 exports
  python -m offline_teacher.main inspect {recipe.store_path}   what the teacher predicted for one sequence
  make ui                                               the tracked runs"""


def precision_overrides(has_bfloat16: bool) -> list[str]:
    """Returns overrides of the recipe: float32 on processors on which bfloat16 is far slower."""
    return [] if has_bfloat16 else ["teacher.dtype=float32", "train.dtype=float32"]


def commands(overrides: list[str]) -> dict[str, tuple[list[str], str]]:
    """Returns stage -> (its command as a user types it, about how long it takes on two cores)."""
    path = RECIPE if not RECIPE.is_relative_to(Path.cwd()) else RECIPE.relative_to(Path.cwd())
    student = str(path.parents[2] / "student_train" / "main.py")
    tail = ["--recipe", str(path), *overrides]
    return {
        "teacher": (["python", "-m", "offline_teacher.main", "run", *tail], "30 s"),
        "student": (["deepspeed", "--num_accelerators", str(RANKS), student, *tail], "1 min"),
        "evaluation": (["python", "-m", "evaluation.main", *tail], "2 min"),
    }


def main() -> None:
    argparse.ArgumentParser(prog="python -m infra.demo", description=__doc__).parse_args()
    overrides = precision_overrides(computes_bfloat16())
    recipe = load_recipe(str(RECIPE), overrides)
    begin = time.monotonic()
    say("writing text in a small language, five labelled tasks and a teacher (about 2 s)")
    write_inputs(Path(recipe.root) / "input")
    binaries = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}
    for name, (words, duration) in commands(overrides).items():
        say(f"$ {shlex.join(words)}  (about {duration})")
        run_stage(words, environment, Path(recipe.root) / "logs" / f"{name}.log")
    report = storage.read_json(f"{recipe.evaluation_dir}/report.json")
    held_out = {}
    for name, run in recipe.runs().items():
        model = storage.read_json(storage.join(run.directory, "model.json"))
        held_out[name] = model["results"]["validation"]
    say(f"\n{result_table(report, held_out)}\n")
    say(f"Scores: percent, medians of {len(report['seeds'])} seeds [95 % intervals over examples and seeds].")
    say(f"Done in {console.duration(time.monotonic() - begin)}. {NEXT.format(recipe=recipe)}")


def cli() -> NoReturn:
    console.command(main)


if __name__ == "__main__":
    cli()
