"""A cache of remote files on the local disk."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable

from infra.errors import UserError, WrongContent
from infra.files import storage
from infra.files.locks import locked
from infra.files.os_errors import reporting_os_errors
from infra.files.scratch import Scratch
from infra.redaction import without_secrets

_Version = tuple[str, int, int, int]
"""Path, inode, size and modification time in nanoseconds: they differ if the content was replaced."""

ENTRY = "xxh3-128-"
"""Prefix of the file name of an entry."""
SCANS = 64
"""``get_or_fetch`` evicts entries each time it has added 1 / SCANS of the size limit."""


class Cache:
    """A directory of cached files with least-recently-used eviction; processes may share the directory.

    Entries of ``local_path`` are complete files, named by their digest; entries of ``get_or_fetch`` are parts
    of files. Each thread holds a lock on the last file that ``local_path`` returned to it, so that another
    process cannot evict the file before it is opened. Linux keeps an open or mapped file readable. Entries
    that are locked or being fetched do not count towards the size limit, and ``get_or_fetch`` may exceed the
    limit by 1/64 per process.
    """

    def __init__(self, directory: str | None, max_bytes: int) -> None:
        if directory is None:
            self._private = Scratch()  # removed with this object
            directory = self._private.path
        with reporting_os_errors(directory):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        self.directory, self.max_bytes = directory, max_bytes
        self._checked: set[_Version] = set()  # versions of files with the right content
        self._added = 0  # bytes added since the last eviction
        self._held = threading.local()

    def local_path(self, path: str, digest: str) -> str:
        """Returns a local path with the content of ``path``, whose digest is checked once per version. Raises
        WrongContent if the content has another digest, for a remote file after three downloads."""
        if not storage.is_remote(path):
            self._check(path, path, digest)
            return path
        name = digest.replace(":", "-")
        entry = storage.join(self.directory, name)
        with reporting_os_errors(entry), locked(storage.join(self.directory, f".lock-{name[-2:]}")):
            while True:
                if not self._usable(entry, path, digest):
                    storage.fetch(path, entry, digest)
                    with contextlib.suppress(FileNotFoundError):  # evicted by another process already
                        self._checked.add(_version(entry))
                if self._hold(entry):
                    break
        self._evict()
        return entry

    def get_or_fetch(self, name: str, fetch: Callable[[], bytes]) -> bytes | mmap.mmap:
        """Returns the entry ``name`` as mapped memory; if it is absent, stores and returns ``fetch()``. The
        content is not checked: the caller must check it, and call ``drop`` if the entry is damaged."""
        entry = storage.join(self.directory, f"{ENTRY}{name}")
        lock = storage.join(self.directory, f".lock-{storage.digest_bytes(name.encode())[-2:]}")
        with reporting_os_errors(entry):
            mapped = _map(entry)
            if mapped is not None:
                return mapped
            with locked(lock):  # only one process fetches the entry
                mapped = _map(entry)
                if mapped is not None:
                    return mapped
                data = fetch()
                with storage.publishing(entry, durable=False) as draft, open(draft, "wb") as file:
                    file.write(data)
        self._added += len(data)
        if self._added * SCANS >= self.max_bytes:
            self._added = 0
            self._evict()
        return data

    def drop(self, name: str) -> None:
        """Removes the entry ``name`` of ``get_or_fetch`` if it exists."""
        storage.remove(storage.join(self.directory, f"{ENTRY}{name}"))

    def _usable(self, entry: str, path: str, digest: str) -> bool:
        with contextlib.suppress(UserError):  # the entry is absent or damaged
            self._check(entry, path, digest)
            return True
        storage.remove(entry)
        return False

    def _check(self, file: str, path: str, digest: str) -> None:
        with reporting_os_errors(path):
            version = _version(file)
        if version not in self._checked:
            if storage.digest_file(file) != digest:
                raise WrongContent(f"{without_secrets(path)}: damaged content (digest is not {digest})")
            self._checked.add(version)

    def _hold(self, entry: str) -> bool:
        """Locks an entry for this thread; returns False if another process has evicted it in the meantime."""
        try:
            file = open(entry, "rb")  # noqa: SIM115 - stays open until this thread's next entry
        except FileNotFoundError:
            return False
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink == 0:
            return False
        modified = os.fstat(file.fileno()).st_mtime_ns  # unchanged, since _Version contains it
        os.utime(file.fileno(), ns=(time.time_ns(), modified))
        self._held.file = file
        return True

    def _evict(self) -> None:
        with locked(storage.join(self.directory, ".lock")):
            entries = []
            for item in os.scandir(self.directory):
                if item.name.startswith(ENTRY):
                    with contextlib.suppress(FileNotFoundError):
                        status = item.stat()
                        entries.append((status.st_atime_ns, item.path, status.st_size))
            total = sum(size for _, _, size in entries)
            for _, entry, size in sorted(entries):
                if total <= self.max_bytes:
                    return
                if _unlink_unless_locked(entry):
                    total -= size


def _version(file: str) -> _Version:
    """Publishing a new content changes the inode; writing in place changes the modification time."""
    status = os.stat(file)
    return file, status.st_ino, status.st_size, status.st_mtime_ns


def _map(entry: str) -> mmap.mmap | None:
    """Maps an entry and marks it as the most recently used; None if it is absent. The mapping stays readable
    after the entry is evicted."""
    try:
        with open(entry, "rb") as file:
            modified = os.fstat(file.fileno()).st_mtime_ns
            os.utime(file.fileno(), ns=(time.time_ns(), modified))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, ValueError):  # absent, or empty after a crash
        return None


def _unlink_unless_locked(entry: str) -> bool:
    with contextlib.suppress(OSError), open(entry, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(entry)
        return True
    return False
