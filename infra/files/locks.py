"""Locks between the processes that share a directory. The lock of a dead process is released.

A file, not the directory, is locked, because NFS can lock only writable files. So the lock also works between
two machines on NFS.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from infra.errors import UserError
from infra.files import storage
from infra.files.os_errors import naming


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Waits for the lock of the file ``path``, which is created if need be, and holds it.

    On a file system without locks it does nothing. Raises OSError if the file cannot be created.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def exclusive(directory: str) -> Iterator[None]:
    """A context that one process at a time can enter, on any machine; raises UserError at once for a second
    one.

    On object stores and file systems without locks it does nothing. A process that may not write to the
    directory enters without a lock, because it can only find that all work is done.
    """
    if storage.is_remote(directory):
        yield
        return
    with naming(directory):
        os.makedirs(directory, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(open(storage.join(directory, storage.LOCK), "ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{directory}: another process is at work on it; wait for it, or stop it"
            ) from None
        except OSError:
            pass
        yield
