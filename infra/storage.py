"""Files by path or URL: published whole or not at all, read with one clear line when that fails.

Local: a private temporary file in the same directory, fsync, rename, fsync of the directory.
Object stores (``s3://``, ``gs://``, ``abfs://``): one whole upload. Every path is a str.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import io
import json
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Container, Iterator, Sequence
from typing import IO, Any, BinaryIO, cast

import xxhash

from infra import remote
from infra.errors import UserError

CHUNK = 8 << 20
"""Bytes read at once."""
FETCH_ATTEMPTS = 3
"""Downloads of a file before its content is called wrong."""
UNFINISHED = ".tmp-"
"""What the name of a file not yet published begins with."""

_UMASK = os.umask(0o077)
os.umask(_UMASK)


class WrongContent(UserError):
    """A file is there but its digest is not the recorded one."""


class DamagedFile(UserError):
    """A compressed file cannot be decompressed to its end."""


# --- names ------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    return remote.scheme(path) is not None


def join(root: str, *names: str) -> str:
    """``root/name/...``; refuses a name that would leave ``root`` (names may come from an untrusted file)."""
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or any(c in "\\\0" or ord(c) < 32 for c in name):
            raise UserError(f"{remote.shown(root)}: {name!r} is not the name of a file inside it")
    base = root.rstrip("/")
    if not base:  # "" or "/"
        return root[:1] + "/".join(names)
    return "/".join([base, *names])


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    return _info(path) is not None


def size(path: str) -> int:
    """Bytes of a file."""
    if not is_remote(path):
        with _naming(path):
            return os.stat(path).st_size
    info = _info(path)
    if info is None:
        raise UserError(f"{remote.shown(path)}: no such file")
    return int(info["size"] or 0)


def list_names(directory: str) -> list[str]:
    """Sorted plain names of the files and directories in it, unfinished ones left out; [] if absent."""
    try:
        if is_remote(directory):
            here = remote.key_of(directory)
            found = remote.call(directory, "ls", here, detail=False)
            names = {str(key).rstrip("/").rpartition("/")[2] for key in found if str(key).rstrip("/") != here}
        else:
            with _naming(directory, FileNotFoundError, NotADirectoryError):
                names = set(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if not name.startswith(UNFINISHED))


def expand(globs: Sequence[str]) -> list[str]:
    """The files that match, sorted, each once. Raises ``UserError`` for a glob that matches none."""
    found: set[str] = set()
    for pattern in globs:
        if is_remote(pattern):
            head = pattern.partition("://")[0]
            found_keys = remote.call(pattern, "glob", remote.key_of(pattern), detail=True)
            matches = [f"{head}://{key}" for key, info in found_keys.items() if info["type"] == "file"]
        elif os.path.isfile(pattern):
            matches = [pattern]
        elif os.path.isdir(pattern):
            raise UserError(
                f"{pattern}: is a directory; name its files, for example {join(pattern, '*.txt')}"
            )
        else:
            matches = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        if not matches:
            raise UserError(f"{remote.shown(pattern)}: matches no file")
        found.update(matches)
    return sorted(found)


# --- reading ------------------------------------------------------------------------------------------------


def read_bytes(path: str) -> bytes:
    if not is_remote(path):
        with _naming(path), open(path, "rb") as file:
            return file.read()
    with _naming(path):
        return bytes(remote.call(path, "cat_file", remote.key_of(path), size=size(path)))


def read_json(path: str) -> Any:
    try:
        return json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{remote.shown(path)}: is not JSON: {problem}") from None


def open_binary(path: str) -> BinaryIO:
    """A file as a stream of bytes; ``.gz`` and ``.zst`` decompressed, damage there raises ``DamagedFile``."""
    source: Any
    with _naming(path):
        source = io.BufferedReader(_RemoteFile(path), CHUNK) if is_remote(path) else open(path, "rb")  # noqa: SIM115
    if path.endswith((".gz", ".zst")):
        return io.BufferedReader(_Decompressed(source, path), 1 << 20)
    return cast(BinaryIO, source)


def open_text(path: str, errors: str = "strict") -> IO[str]:
    """The same as UTF-8 text; ``errors`` as in ``bytes.decode``."""
    return io.TextIOWrapper(open_binary(path), encoding="utf-8", errors=errors)


def digest_bytes(data: bytes) -> str:
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}"


def digest_file(path: str) -> str:
    with _naming(path):
        source: Any = _RemoteFile(path) if is_remote(path) else open(path, "rb", buffering=0)  # noqa: SIM115
        with source:
            return _digest_stream(source)


# --- writing ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def publishing(path: str) -> Iterator[str]:
    """Yields the path of an empty private local file to fill; on clean exit it is published as ``path``.

    The temporary name keeps the extension of ``path``, for libraries that look at it.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            draft = os.path.join(directory, path.rpartition("/")[2])
            yield draft
            with _naming(path):
                remote.call(path, "put_file", draft, remote.key_of(path), size=os.stat(draft).st_size)
        return
    directory, name = os.path.split(os.path.abspath(path))
    draft = os.path.join(directory, f"{UNFINISHED}{secrets.token_hex(6)}-{name[-200:]}")
    with _naming(path):
        os.makedirs(directory, exist_ok=True)
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with _naming(path, only=NO_ROOM):
            yield draft
        with _naming(path):
            _sync(draft)
            os.chmod(draft, 0o666 & ~_UMASK)
            os.replace(draft, path)
            _sync(directory)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)


def publish_bytes(path: str, data: bytes) -> None:
    if is_remote(path):
        with _naming(path):
            remote.call(path, "pipe_file", remote.key_of(path), data, size=len(data))
        return
    with publishing(path) as draft, open(draft, "wb") as file:
        file.write(data)


def publish_json(path: str, value: Any) -> None:
    """Canonical: the same value always gives the same bytes. NaN and infinity raise ``ValueError``."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    publish_bytes(path, (text + "\n").encode())


def remove(path: str) -> None:
    """Removes one file; an absent one is no error."""
    with _naming(path, FileNotFoundError), contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            remote.call(path, "rm_file", remote.key_of(path))
        else:
            os.unlink(path)


def remove_tree(path: str) -> None:
    """Removes a directory and all in it; an absent one is no error."""
    with _naming(path, FileNotFoundError), contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            remote.call(path, "rm", remote.key_of(path), recursive=True)
        else:
            shutil.rmtree(path)


def remove_unfinished(directory: str) -> None:
    """Removes, at any depth, what killed writers left. Only while no writer is at work there."""
    if not is_remote(directory):
        for folder, _, names in os.walk(directory):
            for name in names:
                if name.startswith(UNFINISHED):
                    remove(os.path.join(folder, name))


# --- cache --------------------------------------------------------------------------------------------------


class Cache:
    """Remote files kept on local disk, least recently used first out; processes may share the directory.

    Entries are named by their digest. A thread holds a lock on the last entry it was given, so that another
    process cannot evict it before it is opened; once open or mapped, Linux keeps it readable. The bound
    holds for the entries, apart from those held and those being fetched.
    """

    def __init__(self, directory: str | None, max_bytes: int) -> None:
        if directory is None:
            self._private = tempfile.TemporaryDirectory(prefix="cache-")  # goes with this object
            directory = self._private.name
        with _naming(directory):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        self.directory, self.max_bytes = directory, max_bytes
        self._checked: set[tuple[str, int, int]] = set()  # marks of files whose content was found right
        self._held = threading.local()

    def local(self, path: str, digest: str) -> str:
        """A local path with the content of ``path``; its digest is checked before this object's first use.

        Raises ``WrongContent`` when the content has another digest, for a remote file after three downloads.
        """
        if not is_remote(path):
            self._check(path, path, digest)
            return path
        name = digest.replace(":", "-")
        entry = join(self.directory, name)
        with _naming(entry), _locked(join(self.directory, f".lock-{name[-2:]}")):  # one fetch an entry
            while True:
                if not self._usable(entry, path, digest):
                    self._fetch(path, entry, digest)
                if self._hold(entry):
                    break
        self._evict()
        return entry

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
        with _naming(path):
            mark = _mark(file)
        if mark not in self._checked:
            if digest_file(file) != digest:
                raise WrongContent(f"{remote.shown(path)}: damaged content (digest is not {digest})")
            self._checked.add(mark)

    def _fetch(self, path: str, entry: str, digest: str) -> None:
        for _ in range(FETCH_ATTEMPTS):
            with contextlib.suppress(WrongContent):
                with publishing(entry) as draft:
                    with _RemoteFile(path) as source, open(draft, "wb") as target:
                        shutil.copyfileobj(source, target, CHUNK)
                    if digest_file(draft) != digest:
                        raise WrongContent(path)
                    self._checked.add((entry, *_mark(draft)[1:]))
                return
        raise WrongContent(
            f"{remote.shown(path)}: damaged content (digest is not {digest}, {FETCH_ATTEMPTS} downloads)"
        )

    def _hold(self, entry: str) -> bool:
        """False: another process evicted it in between."""
        try:
            file = open(entry, "rb")  # noqa: SIM115 - held until this thread asks for another
        except FileNotFoundError:
            return False
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink == 0:
            return False
        os.utime(file.fileno())
        self._held.file = file
        return True

    def _evict(self) -> None:
        with _locked(join(self.directory, ".lock")):
            entries = []
            for item in os.scandir(self.directory):
                if item.name.startswith("xxh3-128-"):
                    with contextlib.suppress(FileNotFoundError):
                        status = item.stat()
                        entries.append((status.st_mtime_ns, item.path, status.st_size))
            total = sum(size for _, _, size in entries)
            for _, entry, size in sorted(entries):
                if total <= self.max_bytes:
                    return
                if _unlink_unless_held(entry):
                    total -= size


def _mark(file: str) -> tuple[str, int, int]:
    """A published file never changes: another content is another inode."""
    status = os.stat(file)
    return file, status.st_ino, status.st_size


def _unlink_unless_held(entry: str) -> bool:
    with contextlib.suppress(OSError), open(entry, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(entry)
        return True
    return False


# --- inside -------------------------------------------------------------------------------------------------


class _RemoteFile(io.RawIOBase):
    """A remote file read in ranges, each a call of its own that is repeated when it fails or falls short."""

    def __init__(self, path: str) -> None:
        self._path, self._key, self._size, self._at = path, remote.key_of(path), size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = self._range(self._at, stop)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)

    def _range(self, start: int, stop: int) -> bytes:
        def once() -> bytes:
            data = remote.call(self._path, "cat_file", self._key, start=start, end=stop, size=stop - start)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came of {stop - start}")
            return bytes(data)

        return bytes(remote.repeated(once, self._path))


class _Decompressed(io.RawIOBase):
    """pyarrow's decompression: unlike other Python bindings it tells when a zstd file was cut short."""

    def __init__(self, source: Any, path: str) -> None:
        import pyarrow as pa

        kind = "gzip" if path.endswith(".gz") else "zstd"
        self._stream, self._path = pa.CompressedInputStream(pa.PythonFile(source, "r"), kind), path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as problem:
            raise DamagedFile(f"{remote.shown(self._path)}: damaged compressed data: {problem}") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _info(path: str) -> dict[str, Any] | None:
    try:
        return dict(remote.call(path, "info", remote.key_of(path)))
    except FileNotFoundError:
        return None


def _digest_stream(source: Any) -> str:
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK))
    while count := source.readinto(buffer):
        state.update(buffer[:count])
    return f"xxh3-128:{state.hexdigest()}"


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """An exclusive lock between processes and threads; a dead holder holds nothing."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
"""What an ``OSError`` in the body of ``publishing`` must be for the file published to be to blame."""


@contextlib.contextmanager
def _naming(path: str, *let_through: type[Exception], only: Container[int] | None = None) -> Iterator[None]:
    """Turns an ``OSError`` into one sentence naming the path."""
    try:
        yield
    except OSError as problem:
        if isinstance(problem, let_through) or (only is not None and problem.errno not in only):
            raise
        absent = isinstance(problem, FileNotFoundError)
        reason = _REASONS.get(
            errno.ENOENT if absent else problem.errno or 0, problem.strerror or str(problem)
        )
        raise UserError(f"{remote.shown(path)}: {reason}") from problem
