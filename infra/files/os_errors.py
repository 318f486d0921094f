"""Turns an ``OSError`` (a full disk, a missing file) into one sentence that names the file."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Container, Iterator

from infra.errors import NodeError
from infra.files import remote

_REASONS = {
    errno.ENOENT: "no such file",
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EROFS: "the file system is read-only; choose another output",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EISDIR: "is a directory, not a file",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EEXIST: "a file of that name is in the way",
}

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG})
"""Errors inside ``publishing`` whose message names the file that is written; others name another file."""


@contextlib.contextmanager
def naming(path: str, *let_through: type[Exception], only: Container[int] | None = None) -> Iterator[None]:
    """Turns an ``OSError`` into a ``NodeError``: one sentence that names the path."""
    try:
        yield
    except OSError as problem:
        if isinstance(problem, let_through) or (only is not None and problem.errno not in only):
            raise
        absent = isinstance(problem, FileNotFoundError)
        reason = _REASONS.get(
            errno.ENOENT if absent else problem.errno or 0, problem.strerror or str(problem)
        )
        raise NodeError(f"{remote.shown(path)}: {reason}") from problem
