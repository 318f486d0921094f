"""Time of commands that have nothing to compute: ``--help``, a mistake, or work that is already finished.

``run()`` first makes a tiny project with the three commands, then starts every command a few times, in turn.
Commands started by a launcher, which itself imports torch, have separate rows without a goal.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.results import Row, row, rows_table
from tests.conftest import ROOT
from tests.starts import COMMANDS, mistakes
from tests.tiny_project import (
    all_commands,
    evaluation_command,
    make_project,
    student_command,
    teacher_command,
)
from tests.tiny_project import run as run_command

REPEATS = 5
GOAL = "<= 1"


def seconds_of(commands: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, float]]:
    """Returns the median wall and CPU seconds of each command; they run in turn, after a warm-up round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(REPEATS + 1):
        for name, words in commands.items():
            used, begin = _children_seconds(), time.perf_counter()
            ended = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=600, check=False)
            taken[name].append((time.perf_counter() - begin, _children_seconds() - used))
            if ended.returncode not in (0, 2):
                raise RuntimeError(f"{words}: {ended.stderr.decode()[-500:]}")
    return {
        name: (
            statistics.median(wall for wall, _ in times[1:]),
            statistics.median(cpu for _, cpu in times[1:]),
        )
        for name, times in taken.items()
    }


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def rows(kind: str, commands: Mapping[str, Sequence[str]], goal: str | None = GOAL) -> list[Row]:
    return [
        row(f"starts.{kind}: {name}", wall, "s", goal, f"median of {REPEATS}; {cpu:.2f} s of CPU")
        for name, (wall, cpu) in seconds_of(commands).items()
    ]


def run() -> list[Row]:
    helps = {name: [sys.executable, *words, "--help"] for name, words in COMMANDS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        recipe = make_project(Path(scratch, "project"))
        for command in all_commands(recipe):
            done = run_command(command)
            assert done.returncode == 0, done.stderr
        wrong = {name: [sys.executable, *words] for name, words in mistakes(Path(scratch)).items()}
        wrong["ui"] = ["make", "-s", "ui", f"RUNS={scratch}", "-o", ".venv/installed"]
        model = str(recipe.parent / "runs/tiny/student/model")
        export = [
            sys.executable,
            *COMMANDS["evaluation export"],
            "--model",
            model,
            "--output",
            f"{scratch}/x",
        ]
        finished = {
            "teacher run": teacher_command(recipe),
            "student": student_command(recipe, ranks=0),
            "evaluation": evaluation_command(recipe),
            "evaluation export": export,
        }
        launchers = {
            "student, deepspeed with 2 ranks": student_command(recipe),
            "student, torchrun with 2 ranks": [
                sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                *student_command(recipe, ranks=0)[1:],
            ],
        }  # fmt: skip
        return [
            *rows("help", helps),
            *rows("mistake", wrong),
            *rows("nothing to do", finished),
            *rows("nothing to do, launched", launchers, goal=None),
        ]


if __name__ == "__main__":
    print(rows_table(run()))
