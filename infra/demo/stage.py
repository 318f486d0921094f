"""Runs the command of a stage: its output goes to a log file, and its progress to a bar on the terminal."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from infra.console import PROGRESS_FILE, Progress
from infra.errors import UserError

STOP_SECONDS = 60.0
"""Seconds that a stage has after Ctrl-C to save its state."""
LAST_LINES = 8
"""Number of lines of a failed stage's log that are printed."""


def run_stage(words: list[str], environment: dict[str, str], log: Path) -> None:
    """Runs a command to its end. If it fails, prints the last lines of its log and raises UserError. After
    Ctrl-C, waits for the command to end and raises KeyboardInterrupt."""
    log.parent.mkdir(parents=True, exist_ok=True)
    reports = log.with_suffix(".progress").resolve()
    reports.write_text("")
    with log.open("ab") as output, reports.open(encoding="utf-8") as lines:
        process = subprocess.Popen(
            words, env={**environment, PROGRESS_FILE: str(reports)}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, preexec_fn=lambda: _prepare_child(words),
        )  # fmt: skip
        code, bar = None, None
        try:
            while code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(0.2)
                bar = _show(lines, bar)
        except KeyboardInterrupt:  # the terminal has sent Ctrl-C to the stage too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            process.terminate()
            raise
        finally:
            if bar is not None:
                bar.close()
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-LAST_LINES:]
        print("\n".join(f"| {line}" for line in last), file=sys.stderr)
        where = f"its output is in {log}; the same command continues"
        raise UserError(f"{words[0]} ended with exit code {code}; {where}")


def _prepare_child(words: list[str]) -> None:
    """Prepares the child process before it executes the stage.

    On Linux the stage is ended if the demo is killed, so that no old process disturbs the next start.
    DeepSpeed's launcher would print a traceback on Ctrl-C, so it is made to ignore the signal; its ranks
    still receive it.
    """
    if Path(words[0]).name == "deepspeed":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _show(lines: Iterable[str], bar: Progress | None) -> Progress | None:
    """Shows the reports since the last call. Returns the bar, or None if no bar is open."""
    for line in lines:
        report = json.loads(line)
        if bar is None:
            bar = Progress(report["total"], report["unit"], report["name"], report["done"])
        bar.note(report["note"])
        bar.advance(report["done"] - bar.done)
        if "say" in report:
            bar.say(report["say"])
        if "closed" in report:
            bar.close()
            bar = None
    return bar
