"""Reads and atomically writes files named by a local path or a URL; a failure becomes a one-line UserError.

A local file is written as a private temporary file in the same directory: fsync, rename, fsync of the
directory. An object (``s3://``, ``gs://``, ``abfs://``) is written by one complete upload. Paths are str.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import xxhash

from infra.errors import DamagedFile, UserError, WrongContent
from infra.files import remote
from infra.files.os_errors import WRITE_ERRNOS, reporting_os_errors
from infra.files.streams import Decompressed, RemoteFile, compression, remote_range
from infra.redaction import without_secrets

T = TypeVar("T")
CHUNK = 8 << 20
FETCH_ATTEMPTS = 3
"""Number of downloads of a file with a wrong digest before its content counts as damaged."""
UNFINISHED = ".tmp-"
"""Prefix of the name of an unpublished file."""
LOCK = ".lock"
"""Name of the empty file that `infra.files.locks` locks. Listings leave it out."""

_UMASK = os.umask(0o077)  # it can be read only by setting it
os.umask(_UMASK)


# --- names ------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    return remote.scheme(path) is not None


def join(root: str, *names: str) -> str:
    """Returns ``root/name/...``. Raises UserError for a name that would leave ``root``, since names may come
    from an untrusted file."""
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or any(c in "\\\0" or ord(c) < 32 for c in name):
            raise UserError(f"{without_secrets(root)}: {name!r} is not the name of a file inside it")
    base = root.rstrip("/")
    if not base:  # "" or "/"
        return root[:1] + "/".join(names)
    return "/".join([base, *names])


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    return _info(path) is not None


def kind(path: str) -> str | None:
    """Returns ``file``, ``directory``, or None if the path does not exist."""
    if is_remote(path):
        return (_info(path) or {}).get("type")
    return "file" if os.path.isfile(path) else "directory" if os.path.isdir(path) else None


def size(path: str) -> int:
    """Returns the size of a file in bytes. Raises UserError if it is absent."""
    if not is_remote(path):
        with reporting_os_errors(path):
            return os.stat(path).st_size
    info = _info(path)
    if info is None:
        raise UserError(f"{without_secrets(path)}: no such file")
    return int(info["size"] or 0)


def list_names(directory: str) -> list[str]:
    """Returns the sorted names in ``directory``, without temporary and lock files; [] if it is absent."""
    if is_remote(directory):
        names = {item["name"].rpartition("/")[2] for item in _listed(directory)}
    else:
        try:
            with reporting_os_errors(directory, FileNotFoundError, NotADirectoryError):
                names = set(os.listdir(directory))
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(name for name in names if not (name.startswith(UNFINISHED) or name == LOCK))


def list_sizes(directory: str) -> dict[str, int]:
    """Returns the size in bytes of each file in ``directory`` by its name; {} if the directory is absent.
    Locally, temporary and lock files are left out. On an object store this takes one listing."""
    if is_remote(directory):
        files = [item for item in _listed(directory) if item["type"] == "file"]
        return {item["name"].rpartition("/")[2]: int(item["size"]) for item in files}
    sizes = {}
    for name in list_names(directory):
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            status = os.stat(os.path.join(directory, name))
            if stat.S_ISREG(status.st_mode):
                sizes[name] = status.st_size
    return sizes


# --- reading ------------------------------------------------------------------------------------------------


def read_bytes(path: str) -> bytes:
    with reporting_os_errors(path):
        if is_remote(path):
            return remote_range(path, 0, size(path))
        with open(path, "rb") as file:
            return file.read()


def read_checked(path: str, limit: int, check: Callable[[bytes], T]) -> T | None:
    """Returns ``check(content)`` of a file of at most ``limit`` bytes; None if the file is absent. If
    ``check`` raises ValueError, a remote file is downloaded again, up to three times in all, because the
    download may be at fault."""
    for attempt in range(1, FETCH_ATTEMPTS + 1):
        data = read_small(path, limit)
        try:
            return None if data is None else check(data)
        except ValueError:
            if attempt == FETCH_ATTEMPTS or not is_remote(path):
                raise
    raise AssertionError("not reached")


def read_small(path: str, limit: int) -> bytes | None:
    """Returns the content of a file, read in one request; None if the file is absent. Raises ValueError if
    the file has more than ``limit`` bytes."""
    try:
        with reporting_os_errors(path, FileNotFoundError):
            if is_remote(path):
                data = remote.read_first_bytes(path, limit + 1)
            else:
                with open(path, "rb") as file:
                    actual = os.fstat(file.fileno()).st_size  # read(limit + 1) would allocate limit bytes
                    data = file.read(min(actual, limit) + 1)
    except FileNotFoundError:
        return None
    if len(data) > limit:
        raise ValueError(f"is larger than {limit} bytes")
    return data


def read_range(path: str, start: int, stop: int) -> bytes:
    """Returns bytes ``start`` to ``stop - 1`` of a file in one request. UserError if it has fewer."""
    with reporting_os_errors(path):
        if is_remote(path):
            return remote_range(path, start, stop)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise UserError(f"{path}: ends before byte {stop}")
        return data


def fetch(path: str, target: str, digest: str) -> None:
    """Downloads a remote file and publishes its content as the local file ``target``. Raises
    ``WrongContent``, and publishes nothing, if none of three downloads has the digest."""
    for _ in range(FETCH_ATTEMPTS):
        with contextlib.suppress(WrongContent):
            with publishing(target) as draft:
                with _open_raw(path) as source, open(draft, "wb") as file:
                    shutil.copyfileobj(source, file, CHUNK)
                if digest_file(draft) != digest:
                    raise WrongContent(path)
            return
    reason = f"after {FETCH_ATTEMPTS} downloads its digest is still not {digest}"
    raise WrongContent(f"{without_secrets(path)}: damaged content ({reason})")


def read_json(path: str) -> Any:
    try:
        return json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as problem:
        raise DamagedFile(f"{without_secrets(path)}: is not JSON: {problem}") from None


def read_object(path: str) -> dict[str, Any]:
    """Returns a JSON file's object; {} if the file is absent, damaged or no object. Other failures raise."""
    with contextlib.suppress(DamagedFile):
        content = read_json(path) if exists(path) else {}
        return content if isinstance(content, dict) else {}
    return {}


def open_binary(path: str) -> BinaryIO:
    """Opens a file as a stream of bytes. A .gz or .zst file is decompressed; damage raises DamagedFile."""
    with reporting_os_errors(path):
        source = io.BufferedReader(_open_raw(path), CHUNK if is_remote(path) else io.DEFAULT_BUFFER_SIZE)
    if compression(path) is not None:
        return io.BufferedReader(Decompressed(source, path), 1 << 20)
    return source


def digest_bytes(data: bytes | memoryview) -> str:
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}"


def digest_file(path: str) -> str:
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK))
    with reporting_os_errors(path), _open_raw(path) as source:
        while count := source.readinto(buffer):
            state.update(buffer[:count])
    return f"xxh3-128:{state.hexdigest()}"


def has_digest(path: str, digest: str) -> bool:
    """Returns whether the file has this digest; a remote file that differs gets up to three downloads."""
    return any(digest_file(path) == digest for _ in range(FETCH_ATTEMPTS if is_remote(path) else 1))


# --- writing ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def publishing(path: str, durable: bool = True) -> Iterator[str]:
    """Yields a local path to write to; its file is published as ``path`` if the context ends cleanly. The
    temporary file has the extension of ``path``, because some libraries choose the format by it. Without
    ``durable`` there is no fsync: a crash of the machine may leave a damaged file, which its reader must
    notice."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            draft = os.path.join(directory, path.rpartition("/")[2])
            with reporting_os_errors(directory, only=WRITE_ERRNOS):
                yield draft
            with reporting_os_errors(path):
                remote.call(path, "put_file", draft, remote.key_of(path), size=os.stat(draft).st_size)
        return
    directory, name = os.path.split(os.path.abspath(path))
    draft = os.path.join(directory, f"{UNFINISHED}{secrets.token_hex(6)}-{name[-200:]}")  # names: <= 255
    with reporting_os_errors(path):
        os.makedirs(directory, exist_ok=True)
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with reporting_os_errors(path, only=WRITE_ERRNOS):
            yield draft
        with reporting_os_errors(path):
            if durable:
                sync(draft)
            os.chmod(draft, 0o666 & ~_UMASK)
            os.replace(draft, path)
            if durable:
                sync(directory)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)


def publish_bytes(path: str, data: bytes | memoryview) -> None:
    if is_remote(path):
        with reporting_os_errors(path):
            remote.call(path, "pipe_file", remote.key_of(path), bytes(data), size=len(data))
        return
    with publishing(path) as draft, open(draft, "wb") as file:
        file.write(data)


def publish_if_absent(path: str, data: bytes) -> bool:
    """Publishes a complete file unless it exists. Of several processes, at most one gets True.

    A local file is published as a hard link, which never replaces a file, and an object by a conditional
    write. For an object False may also mean that this call wrote it: if the answer to the first attempt is
    lost, the second attempt finds the object.
    """
    if is_remote(path):
        with reporting_os_errors(path):
            return remote.create(path, data)
    directory, name = os.path.split(os.path.abspath(path))
    draft = os.path.join(directory, f"{UNFINISHED}{secrets.token_hex(6)}-{name[-200:]}")
    publish_bytes(draft, data)
    try:
        with reporting_os_errors(path, FileExistsError, only=WRITE_ERRNOS):
            os.link(draft, path)
            sync(directory)
        return True
    except FileExistsError:
        return False
    except OSError as problem:
        raise UserError(
            f"{path}: its file system has no hard links ({problem.strerror}), without which two writers "
            "could overwrite each other; choose another file system or an object store"
        ) from problem
    finally:
        remove(draft)


def publish_if_changed(path: str, data: bytes) -> None:
    """Publishes ``data`` unless the file has this content already, because a finished directory may be
    read-only."""
    if not exists(path) or read_bytes(path) != data:
        publish_bytes(path, data)


def publish_json(path: str, value: Any) -> None:
    """Publishes canonical JSON: equal values give equal bytes. NaN and infinity raise ValueError."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    publish_bytes(path, (text + "\n").encode())


def sync(path: str) -> None:
    """Waits until the content of a local file, or a directory's list of names, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(directory: str) -> None:
    """Raises UserError if no file can be published in ``directory``; called before any expensive work."""
    probe = join(directory, "writable")
    publish_bytes(probe, b"")
    remove(probe)


def remove(path: str) -> None:
    """Removes a file; it is no error if the file is absent."""
    with reporting_os_errors(path, FileNotFoundError), contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            remote.call(path, "rm_file", remote.key_of(path))
        else:
            os.unlink(path)


def move(path: str, target: str) -> bool:
    """Moves a file and overwrites ``target``. Returns False, and does nothing, if ``path`` is absent."""
    if is_remote(path):
        if not exists(path):
            return False
        publish_bytes(target, read_bytes(path))
        remove(path)
        return True
    if not os.path.lexists(path):
        return False
    with reporting_os_errors(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.move(path, target)  # the target may be on another file system
    return True


def remove_tree(path: str) -> None:
    """Removes a directory with its content; it is no error if the directory is absent."""
    with reporting_os_errors(path, FileNotFoundError), contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            remote.call(path, "rm", glob.escape(remote.key_of(path)), recursive=True)  # rm expands wildcards
        else:
            shutil.rmtree(path)


def remove_unfinished(directory: str) -> None:
    """Removes temporary files of killed writers from ``directory`` and its subdirectories. No writer may be
    active there."""
    if not is_remote(directory):
        for folder, _, names in os.walk(directory):
            for name in names:
                if name.startswith(UNFINISHED):
                    remove(os.path.join(folder, name))


# --- internal -----------------------------------------------------------------------------------------------


def _info(path: str) -> dict[str, Any] | None:
    try:
        return dict(remote.call(path, "info", remote.key_of(path)))
    except FileNotFoundError:
        return None


def _listed(directory: str) -> Iterator[dict[str, Any]]:
    """Yields fsspec's entry (name, type, size) of each file and directory in a remote directory. A slash at
    the end of a name is removed."""
    own_key = remote.key_of(directory)
    for page in remote.pages(directory):
        entries = ({**entry, "name": str(entry["name"]).rstrip("/")} for entry in page)
        yield from (entry for entry in entries if entry["name"] != own_key)


def _open_raw(path: str) -> Any:
    return RemoteFile(path, size(path)) if is_remote(path) else open(path, "rb", buffering=0)  # noqa: SIM115
