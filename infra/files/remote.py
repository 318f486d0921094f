"""Calls to object stores through fsspec. Each has a time limit and is retried after a temporary failure."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Iterator
from typing import Any

from infra.errors import NodeError, UserError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}
"""URL scheme -> the package that speaks it; imported only when such a URL is used."""
EXTRAS = {"s3fs": "s3", "gcsfs": "gs", "adlfs": "azure"}
"""Package -> the extra of ours that installs it."""

ATTEMPTS = 8
FIRST_WAIT = 0.25
LONGEST_WAIT = 8.0
"""Seconds: a failed call is repeated after 0.25, 0.5, 1 ... 8 s, about 20 s in all; each wait is shortened
by a random part (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/, equal jitter)."""

CALL_SECONDS = 60.0
"""Seconds after which a call counts as hung ..."""
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""... plus the time for its bytes at this rate (bytes a second)."""
LISTING_SECONDS = 3600.0
"""Limit of a listing that cannot be asked for page by page."""
PAGE_NAMES = 1000
"""Names in a page of a listing; S3 gives no more."""
CONNECTIONS = 64
"""To one object store, from one process."""

LASTING = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    TypeError,
    AttributeError,
)
LASTING_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}
"""Errors that are not retried. Those of packages that may not be installed are given by name."""


EXISTS_CODES = {"PreconditionFailed", "412"}
"""What S3 says when an object that must be new is there already."""
NO_RANGE_CODES = {"InvalidRange", "416"}
"""... when an object ends before the range that was asked for begins."""
LASTING_CODES = EXISTS_CODES | NO_RANGE_CODES
ENDED_UPLOAD = "NoSuchUpload"
"""S3's error if a multipart upload is completed twice because the first answer was lost; no file is
missing."""


def scheme(path: str) -> str | None:
    """``s3`` of ``s3://bucket/key``; None for a local path."""
    head, separator, _ = path.partition("://")
    return head.lower() if separator and head.isalnum() else None


def shown(path: str) -> str:
    """The path as it may be printed: no user name, password or query (signatures, tokens) of a URL."""
    if scheme(path) is None:
        return path
    head, _, rest = path.partition("://")
    host, slash, key = rest.partition("?")[0].partition("/")
    keeps_user = scheme(path) in ("abfs", "abfss")  # container@account, not a secret
    return f"{head}://{host if keeps_user and ':' not in host else host.rpartition('@')[2]}{slash}{key}"


def call(
    path: str, method: str, *arguments: Any, size: int = 0, seconds: float | None = None, **options: Any
) -> Any:
    """Runs fsspec's coroutine ``_<method>`` on the file system of ``path``; ``size``: bytes it moves.

    Raises ``FileNotFoundError`` as it is, and ``NodeError`` for anything else that lasts.
    """
    filesystem = _filesystem(_scheme_of(path), _account(path), os.getpid())
    limit = (CALL_SECONDS if seconds is None else seconds) + size / SLOWEST_BYTES_PER_SECOND

    def once() -> Any:
        from fsspec.asyn import sync

        return sync(filesystem.loop, getattr(filesystem, f"_{method}"), *arguments, timeout=limit, **options)

    return repeated(once, path)


def create(path: str, data: bytes) -> bool:
    """Uploads an object; False, and nothing is done, if there is one of this name already.

    If the answer to the first attempt is lost, the second one finds the object that the first has made and
    returns False: the caller compares the content.
    """
    try:
        call(path, "pipe_file", key_of(path), data, size=len(data), mode="create")
    except UserError as error:
        if isinstance(error.__cause__, FileExistsError) or _code(error.__cause__) in EXISTS_CODES:
            return False
        raise
    return True


def beginning(path: str, limit: int) -> bytes:
    """The first bytes of an object, ``limit`` at most, in one request. FileNotFoundError if it is absent."""
    try:
        return bytes(call(path, "cat_file", key_of(path), start=0, end=limit, size=limit))
    except UserError as error:
        if _code(error.__cause__) in NO_RANGE_CODES:
            return b""
        raise


def pages(directory: str) -> Iterator[list[dict[str, Any]]]:
    """What fsspec knows of the files and directories in it, some at a time; nothing if it is absent.

    On S3 each page is a call of its own, so that a long listing neither runs out of time nor begins again.
    """
    here = key_of(directory)
    try:
        if _scheme_of(directory) == "s3":
            yield from _s3_pages(directory, *here.partition("/")[::2])
        else:
            yield call(directory, "ls", here, seconds=LISTING_SECONDS, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return


def _s3_pages(directory: str, bucket: str, prefix: str) -> Iterator[list[dict[str, Any]]]:
    here = f"{prefix}/" if prefix else ""
    asked: dict[str, Any] = {"Bucket": bucket, "Delimiter": "/", "Prefix": here, "MaxKeys": PAGE_NAMES}
    more = True
    while more:
        page = call(directory, "call_s3", "list_objects_v2", **asked)
        folders = [item["Prefix"].rstrip("/") for item in page.get("CommonPrefixes", [])]
        files = [item for item in page.get("Contents", []) if not item["Key"].endswith("/")]
        yield [{"name": f"{bucket}/{name}", "type": "directory", "size": 0} for name in folders] + [
            {"name": f"{bucket}/{item['Key']}", "type": "file", "size": item["Size"]} for item in files
        ]
        more = bool(page.get("IsTruncated"))
        asked["ContinuationToken"] = page.get("NextContinuationToken")


def repeated(once: Any, path: str) -> Any:
    """``once()``, again after a wait while it fails for a passing reason, ``ATTEMPTS`` times at most."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return once()
        except UserError:
            raise
        except Exception as problem:  # noqa: BLE001 - every client library has its own exception classes
            ended = _code(problem) == ENDED_UPLOAD
            if isinstance(problem, FileNotFoundError) and not ended:
                raise
            lasts = not ended and (
                isinstance(problem, LASTING)
                or type(problem).__name__ in LASTING_NAMES
                or _code(problem) in LASTING_CODES
            )
            if lasts or attempt == ATTEMPTS:
                tries = "" if lasts else f" ({attempt} attempts)"
                reason = str(problem) or "no answer in time"
                raise NodeError(f"{shown(path)}: {type(problem).__name__}: {reason}{tries}") from problem
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))
        time.sleep(random.uniform(wait / 2, wait))
    raise AssertionError("not reached")


def key_of(path: str) -> str:
    """The path as the file system names it: ``bucket/key``."""
    return str(_filesystem(_scheme_of(path), _account(path), os.getpid())._strip_protocol(path))


def _scheme_of(path: str) -> str:
    found = scheme(path)
    if found not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise UserError(f"{shown(path)}: unknown kind of URL; known are {known} and local paths")
    return found


def _account(path: str) -> str | None:
    """Azure's storage account in ``abfs://container@account.dfs.core.windows.net/key``."""
    authority = path.partition("://")[2].partition("/")[0]
    return (
        authority.partition("@")[2].partition(".")[0] or None
        if PACKAGES[_scheme_of(path)] == "adlfs"
        else None
    )


@functools.cache
def _filesystem(found: str, account: str | None, process: int) -> Any:
    """One a process: after a fork the parent's event loop is not there."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    if account:
        options["account_name"] = account
    try:
        if found == "s3":
            options["config_kwargs"] = _s3_config()
        protocol = "abfs" if PACKAGES[found] == "adlfs" else found  # fsspec knows no abfss without adlfs
        return fsspec.filesystem(protocol, **options)
    except ImportError:
        package = PACKAGES[found]
        raise UserError(
            f"{found}:// needs the package {package}, which is not installed; install it with"
            f" the extra: pip install 'offline-encoder-distillation[{EXTRAS[package]}]'"
        ) from None


def _s3_config() -> dict[str, Any]:
    """Time limits of one request. s3fs repeats it a few times, so that an upload of a hundred parts does not
    start again when one of them dies; also after a server error, which it takes for lasting by itself."""
    import s3fs.core

    s3fs.core.set_custom_error_handler(_server_error)
    return {
        "connect_timeout": 10,
        "read_timeout": 30,
        "retries": {"max_attempts": 0},
        "max_pool_connections": CONNECTIONS,
    }


def _server_error(problem: Exception) -> bool:
    return int(_answer_of(problem).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500


def _code(problem: BaseException | None) -> str | None:
    """The code of the server's answer, as botocore's error behind that of s3fs has it."""
    cause = problem.__cause__ if problem is not None else None
    code = _answer_of(cause).get("Error", {}).get("Code")
    return None if code is None else str(code)


def _answer_of(problem: BaseException | None) -> dict[str, Any]:
    """What the server said, where botocore's error has it."""
    answer = getattr(problem, "response", None)
    return answer if isinstance(answer, dict) else {}
