"""Temporary directories of processes that end in any way; what the cache makes of one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.files.cache import Cache
from infra.files.scratch import PREFIX, Scratch

HOLDER = """
import sys
from infra.files.cache import Cache
cache = Cache(None, 1)
print(cache.directory, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def holder() -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a cache until its stdin ends, and its directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_goes_with_the_next_and_what_is_in_use_stays(temporary: Path) -> None:
    (killed, abandoned), (living, in_use) = holder(), holder()
    killed.kill()
    killed.wait()
    (abandoned / "file").write_bytes(b"gigabytes")
    own = Scratch()
    assert {abandoned.parent, in_use.parent} == {temporary}
    assert not abandoned.exists()
    assert in_use.exists()
    living.communicate("")
    assert not in_use.exists(), "it goes with its process"
    own.close()
    assert list(temporary.iterdir()) == []


def test_others_directories_stay(temporary: Path) -> None:
    """A link; one of another name; a file."""
    (temporary / "other").mkdir()
    (temporary / "other/file").touch()
    (temporary / f"{PREFIX}link").symlink_to(temporary / "other")
    (temporary / f"{PREFIX}file").touch()
    Scratch().close()
    assert {path.name for path in temporary.iterdir()} == {f"{PREFIX}file", f"{PREFIX}link", "other"}
    assert (temporary / "other/file").exists()


def test_one_that_is_taken_for_abandoned_is_made_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process comes between the making and the lock."""
    taken: list[str] = []
    flock = fcntl.flock

    def after_another(handle: int, operation: int) -> None:
        if not taken:
            taken.extend(path.name for path in temporary.iterdir())
            shutil.rmtree(temporary / taken[0])
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", after_another)
    own = Scratch()
    assert taken
    assert Path(own.path).is_dir()
    own.close()


def test_without_locks_or_listing_it_goes_on(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (temporary / f"{PREFIX}old").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fails)
        patch.setattr(os, "scandir", fails)
        own = Scratch()
    assert Path(own.path).is_dir()
    own.close()


def test_no_directory_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(UserError, match=r"temporary files \(TMPDIR\): "):
        Scratch()


def test_a_cache_goes_with_its_object(temporary: Path) -> None:
    cache = Cache(None, 1)
    assert Path(cache.directory).parent == temporary
    del cache
    assert list(temporary.iterdir()) == []
