"""Feeds damaged inputs to a reader in a child process, within bounds of time and memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import UserError
from tests.fuzz.mutations import generator
from tests.fuzz.readers import READERS

SECONDS = 20
"""Of processor time for one input; it takes a millisecond."""
MEMORY = 1 << 30
"""Bytes beyond what the process has when it starts."""
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Outcome:
    inputs: int
    valid: int
    refused: int
    findings: list[tuple[int, str]]
    """(input number, what happened instead)."""


def fuzz(reader: str, start: int, stop: int) -> Outcome:
    """Inputs start .. stop - 1. A child that dies is a finding, and the next child goes on behind it."""
    valid = refused = 0
    findings: list[tuple[int, str]] = []
    context = multiprocessing.get_context("fork")
    at = start
    while at < stop:
        position = context.Value("q", -1)
        receiving, sending = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(reader, at, stop, position, sending))
        child.start()
        sending.close()
        answer = None
        with contextlib.suppress(EOFError):
            answer = receiving.recv()
        child.join()
        if answer is not None:
            valid, refused = valid + answer[0], refused + answer[1]
            findings += answer[2]
            break
        assert position.value >= 0, f"{reader}: its undamaged inputs cannot be read"
        findings.append((position.value, f"the process ended with {child.exitcode}"))
        at = position.value + 1
    return Outcome(stop - start, valid, refused, findings)


def make_input(reader: str, number: int, wholes: list[bytes]) -> bytes:
    rng = generator(reader, number)
    return READERS[reader].mutate(rng, rng.choice(wholes))


def _work(reader: str, start: int, stop: int, position: Any, sending: Any) -> None:
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as directory:
        wholes, read = READERS[reader].prepare(Path(directory))
        for whole in wholes:  # undamaged ones are valid, and caches are warm
            read(whole)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGVTALRM, _hang)
        counts, findings = [0, 0], []
        for number in range(start, stop):
            position.value = number
            data = make_input(reader, number, wholes) or b"\0"
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            started = time.process_time()
            try:
                read(data)
                counts[0] += 1
            except UserError as problem:
                counts[1] += 1
                if "\n" in str(problem) or len(str(problem)) > 2000:
                    findings.append((number, f"not one clear line: {str(problem)[:200]!r}"))
            except BaseException as problem:
                last = traceback.extract_tb(problem.__traceback__)[-1]
                findings.append(
                    (number, f"{type(problem).__name__}: {problem} ({last.filename}:{last.lineno})"[:400])
                )
            if time.process_time() - started > SECONDS / 4:
                findings.append((number, f"took {time.process_time() - started:.1f} s"))
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sending.send((*counts, findings))


def _hang(number: int, frame: Any) -> None:
    raise TimeoutError("no end in sight")
