"""Private temporary directories that are removed after their process has ended, even if it was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile

from infra.files.os_errors import reporting_os_errors

PREFIX = "distillation-scratch-"


class Scratch:
    """A temporary directory of this process, removed by `close` or when this object is deleted. If the
    process is killed, the next process on this machine that creates a `Scratch` removes the directory."""

    def __init__(self) -> None:
        with reporting_os_errors("the directory for temporary files (TMPDIR)"):
            parent = tempfile.gettempdir()
            _remove_abandoned(parent)
            while True:
                self._directory = tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent)
                self.path = self._directory.name
                try:
                    self._lock = os.open(self.path, os.O_RDONLY)
                except FileNotFoundError:  # another process removed it before it was locked
                    continue
                with contextlib.suppress(OSError):  # without locks no process removes another's
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                if os.path.exists(self.path):
                    break
                os.close(self._lock)

    def close(self) -> None:
        self._directory.cleanup()
        os.close(self._lock)


def _remove_abandoned(parent: str) -> None:
    """Removes the directories of ended processes, as far as they can be listed, locked and deleted."""
    with contextlib.suppress(OSError):
        for item in os.scandir(parent):
            if item.name.startswith(PREFIX) and item.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_unlocked(item.path)


def _remove_unlocked(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    finally:
        os.close(handle)
