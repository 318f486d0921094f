"""Locks between processes that share a directory. The operating system releases the lock of a dead process.

A file is locked, not the directory, because NFS can lock only writable files. So the lock also works between
machines that share an NFS directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from infra.errors import UserError
from infra.files import storage
from infra.files.os_errors import reporting_os_errors


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """A context that waits for the lock of the file ``path`` and holds it; the file is created if absent.

    On a file system without locks the context does not lock. Raises OSError if the file cannot be created.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def exclusive(directory: str) -> Iterator[None]:
    """A context that one process at a time can enter, even if the processes run on several machines.

    Raises UserError at once if another process is in it. On object stores and on file systems without locks
    the context does not lock. A process that may not write to the directory enters without a lock, because
    it can only find that all work is done.
    """
    if storage.is_remote(directory):
        yield
        return
    with reporting_os_errors(directory):
        os.makedirs(directory, exist_ok=True)
    with contextlib.ExitStack() as open_files:
        try:
            file = open_files.enter_context(open(storage.join(directory, storage.LOCK), "ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{directory}: another process is at work on it; let it end, or stop it"
            ) from None
        except OSError:
            pass
        yield
