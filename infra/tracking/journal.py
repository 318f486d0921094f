"""A queue of entries for a server, kept in a file; what a process could not send, the next process sends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import IO, Any

Entry = dict[str, Any]


class Journal:
    """A queue of entries (JSON objects), each kept in a file at least until ``discard``; after a crash, sent
    entries may be sent again, so the sender must tolerate repeats. One process at a time owns the file. The
    queue is in memory only (``on_disk`` is False) if ``path`` is None or cannot be written, or if another
    process owns the file. Appending is flushed to the operating system, not synced to disk. The incomplete
    last line of a killed process is skipped."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file = _open_and_lock(path) if path else None
        self._pending: deque[Entry] = deque(_entries(self._file) if self._file else ())

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def __len__(self) -> int:
        return len(self._pending)

    def append(self, entry: Entry) -> None:
        with self._lock:
            self._pending.append(entry)
            if self._file:
                try:
                    self._file.write(json.dumps(entry) + "\n")
                    self._file.flush()
                except OSError:  # disk full: continue in memory
                    self._file = None

    def head(self, count: int) -> list[Entry]:
        """Returns the oldest entries, at most ``count``, without removing them."""
        with self._lock:
            return [self._pending[i] for i in range(min(count, len(self._pending)))]

    def discard(self, count: int) -> None:
        """Removes the oldest ``count`` entries; the file is emptied when no entry is left."""
        with self._lock:
            for _ in range(count):
                self._pending.popleft()
            if self._file and not self._pending:
                self._file.truncate(0)

    def postpone(self) -> None:
        """Puts the oldest entry behind the others. In the file it keeps its place until ``close``."""
        with self._lock:
            self._pending.rotate(-1)

    def close(self) -> None:
        """Rewrites the file with the pending entries, or removes it if there are none; releases its lock."""
        with self._lock:
            if self._file is None:
                return
            with contextlib.suppress(OSError):
                if self._pending:
                    self._file.truncate(0)
                    self._file.writelines(json.dumps(entry) + "\n" for entry in self._pending)
                else:
                    os.remove(self._file.name)
                self._file.close()
            self._file = None


def _open_and_lock(path: str) -> IO[str] | None:
    """Returns the open, locked file; None if it cannot be written or another process holds its lock."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(file.fileno()).st_size
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            file.write("\n")  # ends the incomplete line of a killed process
            file.flush()
    except OSError:
        file.close()
        return None
    return file


def _entries(file: IO[str]) -> Iterator[Entry]:
    file.seek(0)
    for line in file:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry
