"""Remote files kept on local disk for those who read them again, or map them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time

from infra import remote, storage
from infra.errors import UserError, WrongContent
from infra.locks import locked
from infra.os_errors import naming
from infra.scratch import Scratch

_Mark = tuple[str, int, int, int]


class Cache:
    """Remote files kept on local disk, least recently used first out; processes may share the directory.

    Entries are named by their digest. A thread holds a lock on the last entry it was given, so that another
    process cannot evict it before it is opened; once open or mapped, Linux keeps it readable. The bound
    holds for the entries, apart from those held and those being fetched.
    """

    def __init__(self, directory: str | None, max_bytes: int) -> None:
        if directory is None:
            self._private = Scratch()  # goes with this object
            directory = self._private.path
        with naming(directory):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        self.directory, self.max_bytes = directory, max_bytes
        self._checked: set[_Mark] = set()  # of files whose content was found right
        self._held = threading.local()

    def local(self, path: str, digest: str) -> str:
        """A local path with the content of ``path``; its digest is checked before this object's first use.

        Raises ``WrongContent`` when the content has another digest, for a remote file after three downloads.
        """
        if not storage.is_remote(path):
            self._check(path, path, digest)
            return path
        name = digest.replace(":", "-")
        entry = storage.join(self.directory, name)
        with naming(entry), locked(storage.join(self.directory, f".lock-{name[-2:]}")):  # one fetch an entry
            while True:
                if not self._usable(entry, path, digest):
                    storage.fetch(path, entry, digest)
                    with contextlib.suppress(FileNotFoundError):  # evicted by another process already
                        self._checked.add(_mark(entry))
                if self._hold(entry):
                    break
        self._evict()
        return entry

    def _usable(self, entry: str, path: str, digest: str) -> bool:
        try:
            self._check(entry, path, digest)
        except WrongContent:
            os.unlink(entry)
            return False
        except UserError:  # absent
            return False
        return True

    def _check(self, file: str, path: str, digest: str) -> None:
        with naming(path):
            mark = _mark(file)
        if mark not in self._checked:
            if storage.digest_file(file) != digest:
                raise WrongContent(f"{remote.shown(path)}: damaged content (digest is not {digest})")
            self._checked.add(mark)

    def _hold(self, entry: str) -> bool:
        """False: another process evicted it in between."""
        try:
            file = open(entry, "rb")  # noqa: SIM115 - held until this thread asks for another
        except FileNotFoundError:
            return False
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink == 0:
            return False
        modified = os.fstat(file.fileno()).st_mtime_ns  # stays, since it is in the mark
        os.utime(file.fileno(), ns=(time.time_ns(), modified))
        self._held.file = file
        return True

    def _evict(self) -> None:
        with locked(storage.join(self.directory, ".lock")):
            entries = []
            for item in os.scandir(self.directory):
                if item.name.startswith("xxh3-128-"):
                    with contextlib.suppress(FileNotFoundError):
                        status = item.stat()
                        entries.append((status.st_atime_ns, item.path, status.st_size))
            total = sum(size for _, _, size in entries)
            for _, entry, size in sorted(entries):
                if total <= self.max_bytes:
                    return
                if _unlink_unless_held(entry):
                    total -= size


def _mark(file: str) -> _Mark:
    """Another content is another inode where it was published, another time where it was written in place."""
    status = os.stat(file)
    return file, status.st_ino, status.st_size, status.st_mtime_ns


def _unlink_unless_held(entry: str) -> bool:
    with contextlib.suppress(OSError), open(entry, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(entry)
        return True
    return False
