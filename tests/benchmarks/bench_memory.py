"""Growth of the peak memory of driver and worker when a teacher pass has ten times the text.

Two real passes run with one Ray worker, a tiny teacher and small tasks. The first pass has dozens of tasks
already, so memory that a task, part or metric does not free is ten times as much in the second pass.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.results import Row, row
from tests.offline_teacher.stores import finish, indices, start, workers
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text

LINES, TIMES = 10_000, 10
SEQUENCES_A_TASK, PART_BYTES = 64, 1 << 16
GOAL = 1.1
SAMPLE_SECONDS = 0.02

Peaks = dict[str, int]
"""Process (``driver`` or ``worker``) -> its largest resident set in bytes."""


def run(lines: int = LINES) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        model = save_bert(Path(scratch, "model"))
        peaks, tasks = {}, {}
        for times in (1, TIMES):
            directory = Path(scratch, f"{times}x")
            directory.mkdir()
            text = write_text(directory / "text.txt", lines * times)
            recipe = write_recipe(
                directory,
                text,
                model,
                sequences={"length": 64, "part_bytes": PART_BYTES},
                teacher={"workers": 1},
                store={"task_sequences": SEQUENCES_A_TASK},
                tracking={"enabled": True},
            )
            start_time = time.monotonic()
            peaks[times] = pass_peaks(recipe)
            tasks[times] = len(indices(directory / "runs/tiny/store"))
            memory = ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks[times].items())
            seconds = time.monotonic() - start_time
            print(f"{times}x: {tasks[times]} tasks, {memory}, {seconds:.0f} s", file=sys.stderr)
    return [
        row(
            f"teacher.memory_growth_{name}",
            peaks[TIMES][name] / peaks[1][name],
            "ratio",
            f"<= {GOAL:g}",
            f"peak resident set {peaks[TIMES][name] / 2**20:.1f} MiB over {tasks[TIMES]} tasks, "
            f"{peaks[1][name] / 2**20:.1f} MiB over {tasks[1]}; one worker, tiny teacher",
        )
        for name in ("driver", "worker")
    ]


def pass_peaks(recipe: Path) -> Peaks:
    """Runs a pass to its end, and returns the peak memory of its processes."""
    process = start(recipe)
    driver = psutil.Process(process.pid)
    watched: list[psutil.Process] = []
    peaks = {"driver": 0, "worker": 0}
    while process.poll() is None:
        watched = watched or workers(process.pid)
        for name, processes in (("driver", [driver]), ("worker", watched)):
            for watched_process in processes:
                peaks[name] = max(peaks[name], _resident(watched_process))
        time.sleep(SAMPLE_SECONDS)
    code, output = finish(process)
    assert code == 0, output
    return peaks


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # the process has just ended
        return 0


if __name__ == "__main__":
    for measured in run():
        print(json.dumps(measured))
