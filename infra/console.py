"""What the user sees: exit codes, progress lines, tables."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from infra.errors import UserError

EXIT_INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as shells have it."""
EXIT_TERMINATED = 143
"""SIGTERM (a scheduler ends the job): 128 + SIGTERM."""
LINE_SECONDS = 10.0
"""Between progress lines where stderr is not a terminal."""
PROGRESS_FILE = "OFFLINE_DISTILLATION_PROGRESS"
"""Environment variable with the name of a file to which progress is appended as JSON lines. A program that
runs a stage in the background uses it to show the stage's progress."""
REPORT_SECONDS = 0.2


_received: list[int] = []
"""Signals that ended the stage. The exception does not tell which: Ray raises its own KeyboardInterrupt if a
handler raises within Ray's calls."""


def command(function: Callable[[], int | None]) -> NoReturn:
    """Runs a main and exits: 0 (or what it returns), 2 and one line for a user's mistake, 130, 143.

    Characters that the terminal's encoding lacks are printed as escapes, like ``\\u00fc``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = function() or 0
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        code = problem.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        code = EXIT_TERMINATED if signal.SIGTERM in _received else EXIT_INTERRUPTED
    sys.exit(code)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Keeps our SIGTERM handler during ray.init, which would replace it by a silent exit."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # that exit
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def remember(number: int) -> None:
    """Records the signal for the exit code; for a stage that has its own handler and stops by itself."""
    if number not in _received:
        _received.append(number)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Makes SIGTERM end a stage in the same orderly way as Ctrl-C. A second SIGTERM is ignored."""
    if number not in _received:
        _received.append(number)
        raise KeyboardInterrupt


class Progress:
    """A progress bar on stderr: a count up to ``total``, with rate and remaining time."""

    def __init__(self, total: int | None, unit: str, description: str, done: int) -> None:
        from tqdm import tqdm

        self.done, self._total, self._unit, self._description = done, total, unit, description
        self._note = ""
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit=f" {unit}", desc=description, initial=done, dynamic_ncols=True)
        self._first, self._start, self._printed = done, time.monotonic(), time.monotonic()
        self._printed_done = -1
        self._file, self._reported = os.environ.get(PROGRESS_FILE), 0.0
        self._report()

    def advance(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._report()
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._print_line()

    def note(self, text: str) -> None:
        """A few words shown behind the count from now on, for example the loss."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """A line of its own at once, for example on what is waited for."""
        self._report(say=text)
        line = f"{self._description}: {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._report(closed=True)
        if self._bar is not None:
            self._bar.close()
        elif self._printed_done != self.done:
            self._print_line()

    def _report(self, **more: Any) -> None:
        if self._file:
            self._reported = time.monotonic()
            facts = {"name": self._description, "unit": self._unit, "total": self._total, "done": self.done}
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, "note": self._note, **more}) + "\n")

    def _print_line(self) -> None:
        self._printed, self._printed_done = time.monotonic(), self.done
        rate = (self.done - self._first) / max(self._printed - self._start, 1e-9)
        line = (
            f"{self._description}: {self.done:,}/{self._total:,}"
            if self._total
            else f"{self._description}: {self.done:,}"
        )
        line += f" {self._unit}, {rate:,.4g} {self._unit}/s"
        if self._total and rate > 0 and self.done < self._total:
            line += f", {duration((self._total - self.done) / rate)} left"
        print(f"{line}, {self._note}" if self._note else line, file=sys.stderr, flush=True)


@contextmanager
def progress(total: int | None, unit: str, description: str, done: int = 0) -> Iterator[Progress]:
    """``done``: the count of earlier runs, which is part of the total but not of the rate."""
    shown = Progress(total, unit, description, done)
    try:
        yield shown
    finally:
        shown.close()


def duration(seconds: float) -> str:
    """``75.2`` -> ``1m15s``; ``4000`` -> ``1h07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole // 60 % 60:02d}m"


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """An aligned plain-text table, numbers as they are given."""
    from tabulate import tabulate

    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
