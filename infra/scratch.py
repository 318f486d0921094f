"""Private temporary directories that do not outlive their process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile

from infra.os_errors import naming

PREFIX = "distillation-scratch-"
_LOCK = ".in-use"
"""In each directory, locked by the process that uses it."""


class Scratch:
    """A directory of this process's own; it goes with `close`, with this object, or, where the process is
    killed, with the next one that is made on this machine."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        with naming(parent):
            _remove_abandoned(parent)
            while True:
                self._directory = tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent)
                self.path = self._directory.name
                lock = os.path.join(self.path, _LOCK)
                self._lock = open(lock, "w")  # noqa: SIM115 - held as long as the directory
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                if os.path.exists(lock):
                    break  # else another process saw it unlocked, and took it for abandoned

    def close(self) -> None:
        self._directory.cleanup()
        self._lock.close()


def _remove_abandoned(parent: str) -> None:
    """The directories whose process is gone. One without a lock is being made; a stranger's is not opened."""
    for item in os.scandir(parent):
        if item.name.startswith(PREFIX) and item.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError), open(os.path.join(item.path, _LOCK), "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(item.path)
