"""Temporary directories of processes that end in any way; what the cache makes of one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from infra.cache import Cache
from infra.scratch import PREFIX, Scratch

HOLDER = """
import sys
from infra.cache import Cache
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
    """One being made, whose process has not locked it yet; a link; one of another name."""
    (temporary / f"{PREFIX}new").mkdir()
    (temporary / "other").mkdir()
    (temporary / "other/.in-use").touch()
    (temporary / f"{PREFIX}link").symlink_to(temporary / "other")
    Scratch().close()
    assert {path.name for path in temporary.iterdir()} == {f"{PREFIX}new", f"{PREFIX}link", "other"}
    assert (temporary / "other/.in-use").exists()


def test_a_cache_goes_with_its_object(temporary: Path) -> None:
    cache = Cache(None, 1)
    assert Path(cache.directory).parent == temporary
    del cache
    assert list(temporary.iterdir()) == []
