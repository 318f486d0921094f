"""Command-line output: exit codes, progress lines, tables."""

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
"""Exit code after Ctrl-C: 128 + SIGINT, as in shells."""
EXIT_TERMINATED = 143
"""Exit code after SIGTERM, which a scheduler sends to end a job: 128 + SIGTERM."""
LINE_SECONDS = 10.0
"""Seconds between two progress lines if stderr is not a terminal."""
PROGRESS_FILE = "OFFLINE_DISTILLATION_PROGRESS"
"""Environment variable with the name of a file to which progress is appended as JSON lines. A program that
runs a stage in the background uses it to show the stage's progress."""
REPORT_SECONDS = 0.2
"""Least time in seconds between two JSON lines of progress."""

_received: list[int] = []
"""Signals that ended the stage. KeyboardInterrupt does not say which signal caused it: if a handler raises
while Ray's code runs, Ray raises a KeyboardInterrupt of its own."""


def command(function: Callable[[], int | None]) -> NoReturn:
    """Runs the main function of a command, and exits with its return value, or 0 if it returns None. A
    UserError is printed as one line and gives its exit code (2 for most); Ctrl-C gives 130, SIGTERM 143.
    Characters that the terminal's encoding lacks are printed as escapes, like ``\\u00fc``."""
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
def keeping_sigterm_handler() -> Iterator[None]:
    """A context in which to call ray.init: it restores our SIGTERM handler, which ray.init replaces with a
    silent exit."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # from Ray's handler
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def record_signal(number: int) -> None:
    """Records a signal for the exit code; called by a stage that handles the signal itself and then stops."""
    if number not in _received:
        _received.append(number)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Makes SIGTERM end a stage in the same orderly way as Ctrl-C. A second SIGTERM is ignored."""
    if number not in _received:
        _received.append(number)
        raise KeyboardInterrupt


class Progress:
    """A progress display on stderr that counts up to ``total``, with rate and remaining time. On a terminal
    it is a bar, otherwise a line every ``LINE_SECONDS``."""

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
        """Sets the text that is shown after the count from now on, for example the loss."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """Prints a separate line at once, for example about what the stage waits for."""
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
        count = f"{self.done:,}/{self._total:,}" if self._total else f"{self.done:,}"
        line = f"{self._description}: {count} {self._unit}, {rate:,.4g} {self._unit}/s"
        if self._total and rate > 0 and self.done < self._total:
            line += f", {duration((self._total - self.done) / rate)} left"
        print(f"{line}, {self._note}" if self._note else line, file=sys.stderr, flush=True)


@contextmanager
def progress(total: int | None, unit: str, description: str, done: int = 0) -> Iterator[Progress]:
    """Yields a ``Progress`` that is closed at the end. ``total`` is None if it is unknown. ``done``: count of
    earlier runs, which is part of ``total`` but not of the rate."""
    bar = Progress(total, unit, description, done)
    try:
        yield bar
    finally:
        bar.close()


def duration(seconds: float) -> str:
    """Formats seconds: ``75.2`` -> ``1m15s``; ``4000`` -> ``1h07m``."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    return f"{total // 60}m{total % 60:02d}s" if total < 3600 else f"{total // 3600}h{total // 60 % 60:02d}m"


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Returns a plain-text table with aligned columns; cells are printed as they are, without rounding."""
    from tabulate import tabulate

    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
