"""Private temporary directories that are removed when their process ends, even if it is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile

from infra.files.os_errors import naming

PREFIX = "distillation-scratch-"


class Scratch:
    """A directory of this process. It is removed by `close` or with this object. If the process is killed,
    the next such directory on this machine removes it."""

    def __init__(self) -> None:
        with naming("the directory for temporary files (TMPDIR)"):
            parent = tempfile.gettempdir()
            _remove_abandoned(parent)
            while True:
                self._directory = tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent)
                self.path = self._directory.name
                try:
                    self._lock = os.open(self.path, os.O_RDONLY)
                except FileNotFoundError:  # another process saw it unlocked, and took it for abandoned
                    continue
                with contextlib.suppress(OSError):  # where there are no locks, nobody removes anything
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                if os.path.exists(self.path):
                    break
                os.close(self._lock)

    def close(self) -> None:
        self._directory.cleanup()
        os.close(self._lock)


def _remove_abandoned(parent: str) -> None:
    """The directories whose process is gone, as far as they can be found, locked and removed."""
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
