"""Locks between the processes that share a directory; a dead holder holds nothing.

The lock is that of a file, not of the directory: NFS locks what can be written, so that two machines keep
out of each other's way too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from infra import storage
from infra.errors import UserError
from infra.os_errors import naming


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Waits for the lock of the file ``path``, which is created if need be, and holds it.

    Where the file system has no locks, everybody is let in. OSError where the file cannot be created.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def exclusive(directory: str) -> Iterator[None]:
    """No other process is in such a block with it, on any machine; UserError at once where one is.

    Where there are no locks, on some file systems and on object stores, everybody is let in; so is who may
    not write there, and can only find that all is done.
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
