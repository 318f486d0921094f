"""The environment variables and signals that the launcher (deepspeed, torchrun) gives to this process.

Imports no torch, because torch reads its number of threads from the environment when it is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


def rank_of_environment() -> int:
    """The rank the launcher gave this process; 0 without a launcher. Known before anything is set up."""
    return int(os.environ.get("RANK", "0"))


def share_cores() -> None:
    """Gives a rank its share of the cores, unless OMP_NUM_THREADS is set. Call it before torch is imported.

    torchrun sets one thread, the deepspeed launcher sets none. Without a setting every rank would start a
    thread on every core, and ranks would wait for each other's spinning threads.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))


@contextmanager
def signals_noted(note: Callable[[int], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM only call ``note`` with their number; launchers send both, and more than once."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: note(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_process(code: int) -> NoReturn:
    """Ends this process with ``code``, its output flushed, without the interpreter's own clean-up.

    Gloo's threads live longer than their process group. If one of them frees a tensor while Python shuts
    down, the process aborts, so a finished training would end with SIGABRT (pytorch/pytorch pull request
    179291).
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
