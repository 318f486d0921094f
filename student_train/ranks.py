"""Environment variables, signals and exit of a process that a launcher (deepspeed, torchrun) started.

This module does not import torch, because torch reads its number of threads from the environment when it is
imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


def rank_of_environment() -> int:
    """Returns the rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def share_cores() -> None:
    """Sets OMP_NUM_THREADS to the cores per rank, unless it is set. Call it before torch is imported.
    torchrun sets it to 1. The deepspeed launcher leaves it unset; then every rank would start a thread per
    core, and ranks would wait for each other's spinning threads."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))


@contextmanager
def handling_stop_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """A context in which Ctrl-C and SIGTERM only call ``handler`` with the signal's number. Launchers send
    both signals, and more than once."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: handler(number)) for number in numbers}
    try:
        yield
    finally:
        for number, original in before.items():
            signal.signal(number, original)


def end_process(code: int) -> NoReturn:
    """Flushes stdout and stderr and ends this process with exit code ``code``, without Python's clean-up.
    Threads of Gloo outlive their process group. If one frees a tensor during Python's clean-up, the process
    aborts, so a finished training would end with SIGABRT (pytorch/pytorch pull request 179291)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader of the pipe is gone
            stream.flush()
    os._exit(code)
