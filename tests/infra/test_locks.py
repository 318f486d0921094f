"""Locks between processes: who waits, who is refused, who is let in."""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.files import storage
from infra.files.locks import exclusive, locked

HOLD = """
import sys
from infra.files import locks
print("ready", flush=True)
with getattr(locks, sys.argv[1])(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def hold(kind: str, path: Path, processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """A process that holds the lock, or waits for it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    processes.append(process)
    assert said(process) == "ready"
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_another_process_is_refused_until_the_holder_is_killed(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    store = tmp_path / "new/store"
    holder = hold("exclusive", store, processes)
    assert said(holder) == "held"
    with (
        pytest.raises(UserError, match="another process is at work on it"),
        exclusive(str(store)),
    ):
        raise AssertionError("let in")
    holder.kill()
    holder.wait()
    with exclusive(str(store)):
        pass


def test_a_body_that_fails_lets_go(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the body's own"), exclusive(str(tmp_path)):
        raise OSError("the body's own")
    with exclusive(str(tmp_path)):
        pass


def test_who_waits_gets_it_when_the_holder_is_killed(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    path = tmp_path / "new/file.lock"
    with locked(str(path)):
        waiting = hold("locked", path, processes)
        assert waiting.stdout is not None
        assert select.select([waiting.stdout], [], [], 0.5)[0] == []
    assert said(waiting) == "held"


def test_who_cannot_lock_is_let_in(tmp_path: Path) -> None:
    (tmp_path / storage.LOCK).mkdir()  # no file can be opened
    with exclusive(str(tmp_path)), exclusive(str(tmp_path)):
        pass
    with exclusive("s3://bucket/store"), exclusive("s3://bucket/store"):
        pass


def test_no_listing_tells_of_the_lock(tmp_path: Path) -> None:
    with exclusive(str(tmp_path)):
        assert storage.list_names(str(tmp_path)) == []
        assert storage.list_sizes(str(tmp_path)) == {}
