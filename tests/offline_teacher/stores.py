"""Running the teacher stage as a user does, killing it as the world does, comparing what comes out."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from infra.files import storage
from tests.conftest import ROOT

SECONDS = 280.0


def start(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "offline_teacher.main", "run", "--recipe", str(recipe), *overrides]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def workers(driver: int) -> list[psutil.Process]:
    """The worker processes under a driver that hold a teacher; Ray titles a busy one by its item."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        try:
            title = " ".join(child.cmdline())
            if "TaskWorker" in title or title.startswith("ray::infer "):
                found.append(child)
        except psutil.Error:
            continue
    return found


def indices(store: Path) -> list[Path]:
    """Of the tasks that exist."""
    return sorted((store / "tasks").glob("*/[!.]*.json"))  # none that is being written


def contents(store: Path) -> dict[str, bytes]:
    """Path -> bytes of every file but the recipe, which holds speed settings, and the empty lock."""
    return dict(_contents(store))


def _contents(store: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(store.rglob("*")):
        name = str(path.relative_to(store))
        if path.is_file() and name not in ("recipe.yaml", storage.LOCK):
            yield name, path.read_bytes()
