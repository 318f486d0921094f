"""Stops ``python -m infra.demo`` in each stage, by Ctrl-C and SIGKILL, and compares it with one left alone.

    python -m tests.chaos.demo [--reference DIR] [--directory DIR]

1. A demo that nobody stops; ``--reference`` names a directory where one has been made already.
2. A demo stopped eight times: in each of its four stages once by SIGINT to the foreground processes, as a
   terminal sends it, and once by SIGKILL of every process. Each start is the same command.
3. The store and the students' weights must be the same, byte for byte, and so must the
   scores of every fine-tuning run.

Prints a table; exits 1 where anything differs. About 10 minutes on two cores, half with ``--reference``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from infra.console import table
from tests.chaos.arguments import described
from tests.chaos.student import kill_tree
from tests.offline_teacher.stores import contents

ROOT = Path(__file__).resolve().parents[2]
STAGES = {  # stage: its progress file, and how the name of its longest part begins
    "material": ("", ""),
    "teacher pass": ("teacher", "teacher"),
    "student": ("student", "student"),
    "evaluation": ("evaluation", "fine-tuning"),
}
SECONDS = 1_200.0

Row = list[object]


def start(directory: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """The demo with ``directory`` as its working directory and a session of its own; its log.

    It hears SIGINT also where this process, started in the background, does not.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"{len(list(directory.glob('*.log')))}.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        command = [sys.executable, "-m", "infra.demo"]
        return subprocess.Popen(
            command, cwd=directory, stdout=output, stderr=output, start_new_session=True, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ), log  # fmt: skip


def seen(process: subprocess.Popen[bytes], log: Path, file: str, part: str) -> bool:
    """Waits for the part's progress, or for the demo's first line; False where the demo ended before."""
    reports = log.parent / f"runs/demo/logs/{file}.progress" if file else log
    words = f'"name": "{part}' if file else "a small language"
    deadline = time.monotonic() + SECONDS
    while not reports.exists() or words not in reports.read_text(errors="replace"):
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise SystemExit(f"no {words!r} within {SECONDS:.0f} s:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)
    return True


def stopped(directory: Path, stage: str, number: signal.Signals, dice: random.Random) -> Row:
    """One start that is stopped a random moment after the stage has shown progress."""
    for reports in directory.glob("runs/demo/logs/*.progress"):
        reports.unlink()  # of the start before
    process, log = start(directory)
    caught = seen(process, log, *STAGES[stage])
    time.sleep(dice.uniform(0, 3))  # a random moment, not a synchronisation
    if process.poll() is not None:
        print(f"{stage}: ended before {number.name}", flush=True)
    elif number == signal.SIGKILL:
        kill_tree(process)
    else:
        os.killpg(process.pid, number)
    code = process.wait(SECONDS)
    clean = "Traceback" not in log.read_text(errors="replace")
    expected = -signal.SIGKILL if number == signal.SIGKILL else 128 + number
    print(f"{stage}: {number.name}, exit code {code}", flush=True)
    return [f"{stage}, {number.name}: exit code", code, caught and code == expected and clean]


def whole(directory: Path, what: str) -> Row:
    begin = time.monotonic()
    process, log = start(directory)
    code = process.wait(SECONDS)
    if code:
        print(log.read_text()[-3000:], file=sys.stderr)
    return [f"{what}: seconds to the end", f"{time.monotonic() - begin:.0f}", code == 0]


def same(reference: Path, directory: Path) -> list[Row]:
    stored, kept = (contents(root / "runs/demo/store") for root in (reference, directory))
    rows: list[Row] = [["store: files, all the same bytes", len(stored), bool(stored) and stored == kept]]
    for student in ("half", "small"):
        weights = f"runs/demo/students/{student}/model/model.safetensors"
        equal = (reference / weights).read_bytes() == (directory / weights).read_bytes()
        rows.append([f"{student}: weights, the same bytes", (reference / weights).stat().st_size, equal])
    expected, found = scores(reference), scores(directory)
    return [
        *rows,
        ["fine-tuning runs, all the same scores", len(expected), bool(expected) and expected == found],
    ]


def scores(directory: Path) -> dict[str, object]:
    """Metrics of every fine-tuning run, by its file's name."""
    root = directory / "runs/demo/evaluation/scores"
    return {
        str(path.relative_to(root)): json.loads(path.read_text())["metrics"]
        for path in root.rglob("seed-*.json")
    }


def main() -> int:
    parser = described(__doc__)
    parser.add_argument("--reference", type=Path, help="where `python -m infra.demo` has run to its end")
    parser.add_argument("--directory", type=Path, help="kept afterwards; default: a temporary one")
    options = parser.parse_args()
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        rows: list[Row] = []
        if options.reference is None:
            rows.append(whole(directory / "alone", "never stopped"))
        for stage in STAGES:
            for number in (signal.SIGINT, signal.SIGKILL):
                rows.append(stopped(directory / "stopped", stage, number, dice))
        rows.append(whole(directory / "stopped", "after eight stops"))
        rows += same(options.reference or directory / "alone", directory / "stopped")
    print(table(rows, ["what", "figure", "holds"]))
    return 0 if all(row[-1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
