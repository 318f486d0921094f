"""Remote files kept on local disk for those who read them again, or map them."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable

from infra.errors import UserError, WrongContent
from infra.files import remote, storage
from infra.files.locks import locked
from infra.files.os_errors import naming
from infra.files.scratch import Scratch

_Mark = tuple[str, int, int, int]

ENTRY = "xxh3-128-"
"""Prefix of an entry's name."""
SCANS = 64
"""``data`` evicts entries each time it has added this fraction (1/64) of the size limit."""


class Cache:
    """Remote files kept on local disk, least recently used first out; processes may share the directory.

    Entries of ``local`` are whole files, named by their digest; those of ``data`` are parts of files. A
    thread holds a lock on the last file that ``local`` gave it, so that another process cannot evict it
    before it is opened. Once a file is open or mapped, Linux keeps it readable. Entries that are locked or
    being fetched do not count for the size limit, and with ``data`` each process may exceed the limit by
    1/64.
    """

    def __init__(self, directory: str | None, max_bytes: int) -> None:
        if directory is None:
            self._private = Scratch()  # goes with this object
            directory = self._private.path
        with naming(directory):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        self.directory, self.max_bytes = directory, max_bytes
        self._checked: set[_Mark] = set()  # of files whose content was found right
        self._added = 0  # bytes since the directory was last looked through
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

    def data(self, name: str, fetch: Callable[[], bytes]) -> bytes | mmap.mmap:
        """The bytes of the entry ``name``, mapped; if it is absent, ``fetch`` gives them and they are kept.

        The content is not checked: the caller checks it, and calls ``drop`` for a damaged entry.
        """
        entry = storage.join(self.directory, f"{ENTRY}{name}")
        lock = storage.join(self.directory, f".lock-{storage.digest_bytes(name.encode())[-2:]}")
        with naming(entry):
            found = _mapped(entry)
            if found is not None:
                return found
            with locked(lock):  # one fetch an entry
                found = _mapped(entry)
                if found is not None:
                    return found
                data = fetch()
                _keep(entry, data)
        self._added += len(data)
        if self._added * SCANS >= self.max_bytes:
            self._added = 0
            self._evict()
        return data

    def drop(self, name: str) -> None:
        """Removes the entry ``name`` of ``data``, if it is there."""
        storage.remove(storage.join(self.directory, f"{ENTRY}{name}"))

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
                if item.name.startswith(ENTRY):
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


def _mapped(entry: str) -> mmap.mmap | None:
    """An entry, now the most recently used; None if it is not there. It stays readable when it is evicted."""
    try:
        with open(entry, "rb") as file:
            modified = os.fstat(file.fileno()).st_mtime_ns
            os.utime(file.fileno(), ns=(time.time_ns(), modified))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, ValueError):  # absent, or empty after a crash
        return None


def _keep(entry: str, data: bytes) -> None:
    """Not synchronised: after a crash of the machine the entry may be wrong, which its reader notices."""
    draft = os.path.join(os.path.dirname(entry), f"{storage.UNFINISHED}{secrets.token_hex(6)}")
    try:
        with open(draft, "xb") as file:
            file.write(data)
        os.replace(draft, entry)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)


def _unlink_unless_held(entry: str) -> bool:
    with contextlib.suppress(OSError), open(entry, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(entry)
        return True
    return False
