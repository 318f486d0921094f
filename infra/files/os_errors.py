"""Turns an ``OSError`` (a full disk, a missing file) into one sentence that names the file."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Container, Iterator

from infra.errors import NodeError
from infra.redaction import without_secrets

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

WRITE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG})
"""Error numbers that concern the file that is being written, rather than a file that is read meanwhile."""


@contextlib.contextmanager
def reporting_os_errors(
    path: str, *let_through: type[Exception], only: Container[int] | None = None
) -> Iterator[None]:
    """A context that turns an ``OSError`` into a ``NodeError``, whose one sentence names ``path``. Errors of
    the types ``let_through``, and errors whose number is not in ``only``, are raised unchanged."""
    try:
        yield
    except OSError as problem:
        if isinstance(problem, let_through) or (only is not None and problem.errno not in only):
            raise
        raise as_node_error(problem, path) from problem


def as_node_error(problem: OSError, path: str) -> NodeError:
    """Returns the NodeError for an OSError; its one sentence names ``path``."""
    number = errno.ENOENT if isinstance(problem, FileNotFoundError) else problem.errno or 0
    reason = _REASONS.get(number, problem.strerror or str(problem))
    return NodeError(f"{without_secrets(path)}: {reason}")
