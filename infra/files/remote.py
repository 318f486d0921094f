"""Calls to object stores through fsspec, each with a time limit and with retries after temporary failures."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Iterator
from typing import Any

from infra.errors import NodeError, UserError
from infra.redaction import without_secrets

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}
"""URL scheme -> package that implements it; it is imported only if such a URL is used."""
EXTRAS = {"s3fs": "s3", "gcsfs": "gs", "adlfs": "azure"}
"""Package -> extra of this project that installs it."""

ATTEMPTS = 8
FIRST_WAIT = 0.25
LONGEST_WAIT = 8.0
"""Waits in seconds before a failed call is repeated: 0.25, 0.5, 1 ... 8, about 20 s in all. Each is shortened
by a random part (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/, equal jitter)."""

CALL_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""A call that moves n bytes fails after CALL_SECONDS + n / SLOWEST_BYTES_PER_SECOND seconds."""
LISTING_SECONDS = 3600.0
"""Time limit of a listing that cannot be requested page by page."""
PAGE_NAMES = 1000
"""Number of names per page of a listing, S3's maximum."""
CONNECTIONS = 64
"""Largest number of connections of one process to one object store."""

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
"""Classes of errors that are not retried. Classes of packages that may not be installed are given by name."""

EXISTS_CODES = {"PreconditionFailed", "412"}
"""S3's error codes if an object that must be new exists already."""
NO_RANGE_CODES = {"InvalidRange", "416"}
"""S3's error codes if the requested range begins after the end of the object."""
LASTING_CODES = EXISTS_CODES | NO_RANGE_CODES
ENDED_UPLOAD = "NoSuchUpload"
"""S3's error code if a multipart upload is completed twice because the first answer was lost. s3fs raises it
as FileNotFoundError, although no file is missing."""


def scheme(path: str) -> str | None:
    """Returns ``s3`` for ``s3://bucket/key``; None for a local path."""
    head, separator, _ = path.partition("://")
    return head.lower() if separator and head.isalnum() else None


def call(
    path: str, method: str, *arguments: Any, size: int = 0, seconds: float | None = None, **options: Any
) -> Any:
    """Runs fsspec's coroutine ``_<method>`` on the file system of ``path``, and returns its result. ``size``:
    number of bytes that the call transfers. ``seconds``: time limit without these bytes; None: CALL_SECONDS.
    Raises FileNotFoundError unchanged, and NodeError for any other error that remains after the retries."""
    filesystem = _filesystem(_scheme_of(path), _account(path), os.getpid())
    limit = (CALL_SECONDS if seconds is None else seconds) + size / SLOWEST_BYTES_PER_SECOND

    def once() -> Any:
        from fsspec.asyn import sync

        return sync(filesystem.loop, getattr(filesystem, f"_{method}"), *arguments, timeout=limit, **options)

    return with_retries(once, path)


def create(path: str, data: bytes) -> bool:
    """Uploads an object and returns True; returns False, and does nothing, if the object exists already. If
    the answer to the first attempt is lost, the second attempt finds the object that the first has created
    and returns False. So after False the caller must compare the content."""
    try:
        call(path, "pipe_file", key_of(path), data, size=len(data), mode="create")
    except UserError as error:
        if isinstance(error.__cause__, FileExistsError) or _code(error.__cause__) in EXISTS_CODES:
            return False
        raise
    return True


def read_first_bytes(path: str, limit: int) -> bytes:
    """Returns at most ``limit`` bytes from the start of an object, in one request. Raises FileNotFoundError
    if the object is absent."""
    try:
        return bytes(call(path, "cat_file", key_of(path), start=0, end=limit, size=limit))
    except UserError as error:
        if _code(error.__cause__) in NO_RANGE_CODES:
            return b""
        raise


def pages(directory: str) -> Iterator[list[dict[str, Any]]]:
    """Yields the listing of ``directory`` in pages of entries (name, type, size); nothing if it is absent. On
    S3 each page is a separate call, so a long listing meets its time limits, and a retry repeats one page."""
    key = key_of(directory)
    try:
        if _scheme_of(directory) == "s3":
            yield from _s3_pages(directory, *key.partition("/")[::2])
        else:
            yield call(directory, "ls", key, seconds=LISTING_SECONDS, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return


def _s3_pages(directory: str, bucket: str, prefix: str) -> Iterator[list[dict[str, Any]]]:
    prefix = f"{prefix}/" if prefix else ""
    request: dict[str, Any] = {"Bucket": bucket, "Delimiter": "/", "Prefix": prefix, "MaxKeys": PAGE_NAMES}
    has_more = True
    while has_more:
        page = call(directory, "call_s3", "list_objects_v2", **request)
        folders = [item["Prefix"].rstrip("/") for item in page.get("CommonPrefixes", [])]
        files = [item for item in page.get("Contents", []) if not item["Key"].endswith("/")]
        yield [{"name": f"{bucket}/{name}", "type": "directory", "size": 0} for name in folders] + [
            {"name": f"{bucket}/{item['Key']}", "type": "file", "size": item["Size"]} for item in files
        ]
        has_more = bool(page.get("IsTruncated"))
        request["ContinuationToken"] = page.get("NextContinuationToken")


def with_retries(attempt_call: Any, path: str) -> Any:
    """Returns ``attempt_call()``, which is repeated after a wait while it fails temporarily. After
    ``ATTEMPTS`` attempts, or at once for a permanent failure, raises NodeError; FileNotFoundError and
    UserError are raised unchanged."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return attempt_call()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - every client library has its own exception classes
            code, kind = _code(error), type(error).__name__
            if isinstance(error, FileNotFoundError) and code != ENDED_UPLOAD:
                raise
            lasts = isinstance(error, LASTING) or kind in LASTING_NAMES or code in LASTING_CODES
            lasts = lasts and code != ENDED_UPLOAD
            if lasts or attempt == ATTEMPTS:
                tries = "" if lasts else f" ({attempt} attempts)"
                reason = str(error) or "no answer in time"
                raise NodeError(f"{without_secrets(path)}: {kind}: {reason}{tries}") from error
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))
        time.sleep(random.uniform(wait / 2, wait))
    raise AssertionError("not reached")


def key_of(path: str) -> str:
    """Returns the name of ``path`` in its fsspec file system: ``bucket/key``."""
    return str(_filesystem(_scheme_of(path), _account(path), os.getpid())._strip_protocol(path))


def _scheme_of(path: str) -> str:
    url_scheme = scheme(path)
    if url_scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise UserError(f"{without_secrets(path)}: unknown kind of URL; known are {known} and local paths")
    return url_scheme


def _account(path: str) -> str | None:
    """Returns ``account`` for ``abfs://container@account.dfs.core.windows.net/key``, else None."""
    if PACKAGES[_scheme_of(path)] != "adlfs":
        return None
    authority = path.partition("://")[2].partition("/")[0]
    return authority.partition("@")[2].partition(".")[0] or None


@functools.cache
def _filesystem(url_scheme: str, account: str | None, process: int) -> Any:
    """Returns the fsspec file system of an account, cached per process (``process`` is its id): after a fork
    the parent's event loop does not run in the child."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    if account:
        options["account_name"] = account
    try:
        if url_scheme == "s3":
            options["config_kwargs"] = _s3_config()
        # fsspec alone does not know abfss.
        return fsspec.filesystem("abfs" if PACKAGES[url_scheme] == "adlfs" else url_scheme, **options)
    except ImportError:
        package = PACKAGES[url_scheme]
        raise UserError(
            f"{url_scheme}:// needs the package {package}, which is not installed; install it with"
            f" the extra: pip install 'offline-encoder-distillation[{EXTRAS[package]}]'"
        ) from None


def _s3_config() -> dict[str, Any]:
    """Returns botocore's time limits for one request. s3fs repeats a failed request a few times, so a failed
    part does not restart an upload of a hundred parts. By default it does not repeat one after a server
    error; ``_server_error`` changes that."""
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
    """Returns the server's error code from botocore's error, the cause of an s3fs error; None without one."""
    cause = problem.__cause__ if problem is not None else None
    code = _answer_of(cause).get("Error", {}).get("Code")
    return None if code is None else str(code)


def _answer_of(problem: BaseException | None) -> dict[str, Any]:
    """Returns the server's answer that a botocore error holds; {} for any other error."""
    answer = getattr(problem, "response", None)
    return answer if isinstance(answer, dict) else {}
