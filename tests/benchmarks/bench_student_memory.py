"""Growth of the trainer's memory over 2,000 steps: late resident memory divided by early resident memory.

The real trainer runs on a tiny student and store with bfloat16, compiled loss, MLflow, validation, and
checkpoints every 200 steps. Its resident memory is read whenever it writes a line of its history.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.results import Row, row
from tests.student_train.tiny_run import make_run

ROOT = Path(__file__).resolve().parents[2]
STEPS, FIRST, EVERY, VALIDATE = 2_000, 200, 10, 500
"""Number of steps, first step that counts, steps between two readings, steps between two validations."""
SEQUENCES, BLOCK = 2_000, 64
GOAL = 1.02
POLL_SECONDS = 0.005

Readings = list[tuple[int, int]]
"""(step, resident bytes)."""


def run(steps: int = STEPS) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        recipe = make_run(
            Path(scratch),
            sequences=SEQUENCES,
            block_samples=BLOCK,
            recipe={
                "train": {
                    "max_steps": steps, "epochs": 1000, "dtype": "bfloat16", "compile": True,
                    "log_every": EVERY, "checkpoint_every": 200, "validate_every": VALIDATE,
                },
                "tracking": {"enabled": True},
            },
        )  # fmt: skip
        began = time.monotonic()
        readings = watched(recipe, Path(scratch, "runs/tiny/students/student/history.jsonl"))
    second, last = (_quarter(readings, number, steps) for number in (1, 3))
    early, late = statistics.median(second), statistics.median(last)
    conditions = (
        f"median resident set {late / 2**20:.1f} MiB in the last quarter of steps {FIRST} to {steps}, "
        f"{early / 2**20:.1f} MiB in the second (largest {max(last) / 2**20:.1f} and "
        f"{max(second) / 2**20:.1f}); tiny student, one rank, {time.monotonic() - began:.0f} s"
    )
    return [row("student.memory_growth", late / early, "ratio", f"<= {GOAL:g}", conditions)]


def watched(recipe: Path, history: Path) -> Readings:
    """Runs the training to its end, and returns one reading per line of the history."""
    process = subprocess.Popen(
        [sys.executable, "student_train/main.py", "--recipe", str(recipe)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    trainer, readings, size = psutil.Process(process.pid), [], 0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if not history.exists() or history.stat().st_size == size:
            continue
        size = history.stat().st_size
        lines = history.read_text().splitlines(keepends=True)
        if lines[-1].endswith("\n"):
            readings.append((json.loads(lines[-1])["step"], trainer.memory_info().rss))
    assert process.returncode == 0, "the trainer failed"
    return readings


def _quarter(readings: Readings, number: int, steps: int) -> list[int]:
    """Returns the resident bytes of the readings in quarter ``number`` (0 to 3) of the steps that count."""
    length = (steps - FIRST) / 4
    start = FIRST + number * length
    return [resident for step, resident in readings if start < step <= start + length]


if __name__ == "__main__":
    for measured in run():
        print(json.dumps(measured))
