"""Stops ``python -m infra.demo`` in each stage by Ctrl-C and SIGKILL, and checks that the results are equal.

    python -m tests.chaos.demo [--reference DIR] [--directory DIR]

1. One demo is not stopped; ``--reference`` names the directory of a finished demo instead.
2. Another demo is stopped eight times: in each of its four stages once by SIGINT to the process group, as a
   terminal sends it, and once by SIGKILL of every process. It is always started by the same command.
3. Store, students' weights and scores of every fine-tuning run must be equal, byte for byte.

Prints a table; exits 1 if anything differs. About 10 minutes on two cores, half with ``--reference``.
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
STAGES = {  # stage -> name of its progress file, beginning of the name of its longest progress bar
    "inputs": ("", ""),
    "teacher pass": ("teacher", "teacher"),
    "student": ("student", "student"),
    "evaluation": ("evaluation", "fine-tuning"),
}
SECONDS = 1_200.0

Row = list[object]


def start(directory: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Starts the demo in the working directory ``directory``, in a new session; returns process and log. The
    demo receives SIGINT even if this process was started in the background and ignores it."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"{len(list(directory.glob('*.log')))}.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        command = [sys.executable, "-m", "infra.demo"]
        return subprocess.Popen(
            command, cwd=directory, stdout=output, stderr=output, start_new_session=True, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ), log  # fmt: skip


def wait_for_progress(process: subprocess.Popen[bytes], log: Path, file: str, part: str) -> bool:
    """Waits until a progress bar is shown, or without ``file`` until the demo has printed a line. Returns
    False if the demo ended before."""
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


def start_and_stop(directory: Path, stage: str, number: signal.Signals, rng: random.Random) -> Row:
    """Starts the demo, and stops it a random time after the stage has shown progress."""
    for reports in directory.glob("runs/demo/logs/*.progress"):
        reports.unlink()  # from the previous start
    process, log = start(directory)
    in_time = wait_for_progress(process, log, *STAGES[stage])
    time.sleep(rng.uniform(0, 3))  # a random moment, not a synchronisation
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
    return [f"{stage}, {number.name}: exit code", code, in_time and code == expected and clean]


def run_to_end(directory: Path, what: str) -> Row:
    start_time = time.monotonic()
    process, log = start(directory)
    code = process.wait(SECONDS)
    if code:
        print(log.read_text()[-3000:], file=sys.stderr)
    return [f"{what}: seconds to the end", f"{time.monotonic() - start_time:.0f}", code == 0]


def compare(reference: Path, directory: Path) -> list[Row]:
    stored, kept = (contents(root / "runs/demo/store") for root in (reference, directory))
    rows: list[Row] = [["store: files, all the same bytes", len(stored), bool(stored) and stored == kept]]
    for student in ("half", "small"):
        weights = f"runs/demo/students/{student}/model/model.safetensors"
        equal = (reference / weights).read_bytes() == (directory / weights).read_bytes()
        rows.append([f"{student}: weights, the same bytes", (reference / weights).stat().st_size, equal])
    expected, actual = scores(reference), scores(directory)
    return [
        *rows,
        ["fine-tuning runs, all the same scores", len(expected), bool(expected) and expected == actual],
    ]


def scores(directory: Path) -> dict[str, object]:
    """Returns score file -> metrics of a fine-tuning run."""
    root = directory / "runs/demo/evaluation/scores"
    return {
        str(path.relative_to(root)): json.loads(path.read_text())["metrics"]
        for path in root.rglob("seed-*.json")
    }


def main() -> int:
    parser = described(__doc__)
    parser.add_argument("--reference", type=Path, help="directory of a finished `python -m infra.demo`")
    parser.add_argument("--directory", type=Path, help="directory of the demos, kept; default: temporary")
    options = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        rows: list[Row] = []
        if options.reference is None:
            rows.append(run_to_end(directory / "alone", "never stopped"))
        for stage in STAGES:
            for number in (signal.SIGINT, signal.SIGKILL):
                rows.append(start_and_stop(directory / "stopped", stage, number, rng))
        rows.append(run_to_end(directory / "stopped", "after eight stops"))
        rows += compare(options.reference or directory / "alone", directory / "stopped")
    print(table(rows, ["what", "figure", "holds"]))
    return 0 if all(row[-1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
