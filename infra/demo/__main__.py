"""``python -m infra.demo``: makes the material, then runs the three stage commands as a user types them."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from infra.console import command, table
from infra.errors import UserError
from infra.processor import computes_bfloat16
from infra.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
CORPUS_BYTES, VALIDATION_BYTES, TEACHER_STEPS = 2_200_000, 100_000, 1_000
RANKS = 2
STOP_SECONDS = 60.0
"""For a stage that has heard Ctrl-C to save what it has."""


def begin_stage(words: list[str]) -> None:
    """In the stage's process, before it is one.

    A stage does not outlive a killed demo, so that the next start finds nobody at work (Linux). DeepSpeed's
    launcher answers Ctrl-C with a traceback: it need not hear it, its ranks do.
    """
    if words[0] == "deepspeed":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def run_stage(words: list[str], environment: dict[str, str]) -> float:
    """Run one command, shown first; seconds it took. UserError where it fails: it has said why itself."""
    print(f"\n$ {shlex.join(words)}", flush=True)
    started = time.perf_counter()
    process = subprocess.Popen(words, env=environment, preexec_fn=lambda: begin_stage(words))
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal has told the stage too
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.terminate()
        raise
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise UserError(
            f"{words[0]} ended with exit code {code}; run the same command again to go on from there"
        )
    return time.perf_counter() - started


def precision(has_bfloat16: bool) -> list[str]:
    """Overrides of the recipe: its bfloat16 makes the demo several times longer where it is emulated."""
    return [] if has_bfloat16 else ["teacher.dtype=float32", "train.dtype=float32"]


def main() -> None:
    argparse.ArgumentParser(prog="python -m infra.demo", description=__doc__).parse_args()
    overrides = precision(computes_bfloat16())
    recipe = load_recipe(str(RECIPE), overrides)
    started = time.perf_counter()
    from infra.demo.material import make_material  # torch and transformers: not for --help

    make_material(Path(recipe.root) / "input", CORPUS_BYTES, VALIDATION_BYTES, TEACHER_STEPS)
    seconds = {"language, tasks, teacher": time.perf_counter() - started}

    binaries = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}
    student = str(Path(__file__).parents[2] / "student_train" / "main.py")
    stages = {
        "teacher pass": ["python", "-m", "offline_teacher.main", "run"],
        "student": ["deepspeed", "--num_accelerators", str(RANKS), student],
        "evaluation": ["python", "-m", "evaluation.main"],
    }
    for name, words in stages.items():
        seconds[name] = run_stage([*words, "--recipe", str(RECIPE), *overrides], environment)
    print("\n" + table([[name, f"{value:.0f}"] for name, value in seconds.items()], ["stage", "seconds"]))
    print(f"\nreport: {recipe.evaluation_dir}/report.md    runs: make ui")


def cli() -> NoReturn:
    """The command: ``main`` with its mistakes in one line and its exit codes."""
    command(main)


if __name__ == "__main__":
    cli()
