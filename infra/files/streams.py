"""Streams of bytes: remote files, read by range requests, and decompressed files."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from typing import Any

from infra.errors import DamagedFile
from infra.files import remote
from infra.files.os_errors import reporting_os_errors
from infra.redaction import without_secrets


class RemoteFile(io.RawIOBase):
    """A remote file as a seekable stream. A read is one range request, repeated if it fails or is short."""

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size = path, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        if stop <= self._position:
            return 0
        data = remote_range(self._path, self._position, stop)
        buffer[: len(data)] = data
        self._position = stop
        return len(data)


def remote_range(path: str, start: int, stop: int) -> bytes:
    """Returns bytes ``start`` to ``stop`` of a remote file; a request that fails or is short is repeated."""
    key = remote.key_of(path)

    def once() -> bytes:
        data = remote.call(path, "cat_file", key, start=start, end=stop, size=stop - start)
        if len(data) != stop - start:
            raise OSError(f"got {len(data)} of {stop - start} bytes")
        return bytes(data)

    return bytes(remote.with_retries(once, path))


def compression(path: str) -> str | None:
    """Returns ``gzip`` or ``zstd`` for the suffix .gz or .zst of a name in any case, else None."""
    name = path.lower()
    return "gzip" if name.endswith(".gz") else "zstd" if name.endswith(".zst") else None


def first_bytes(path: str, size: int, count: int) -> bytes:
    """Returns the first ``count`` bytes of a file of ``size`` bytes, without decompressing them."""
    with (
        reporting_os_errors(path),
        RemoteFile(path, size) if remote.scheme(path) else open(path, "rb", buffering=0) as file,
    ):
        return file.read(count) or b""


def decompress_beginning(data: bytes, path: str, count: int) -> bytes:
    """Decompresses ``data``, the first bytes of the file ``path``. Returns at most ``count`` bytes of text,
    fewer if ``data`` ends or is damaged before."""
    text = bytearray()
    with contextlib.suppress(DamagedFile), Decompressed(io.BytesIO(data), path) as stream:
        while len(text) < count and (piece := stream.read(min(count - len(text), 1 << 20))):
            text += piece
    return bytes(text)


def expansion_ratio(path: str, size: int, count: int) -> float:
    """Returns decompressed bytes per compressed byte in the first ``count`` bytes of a file; at least 1."""
    head = first_bytes(path, size, count)
    return max(1.0, len(decompress_beginning(head, path, 1 << 40)) / max(1, len(head)))


class TooLargeWindow(DamagedFile):
    """A zstd file with a window above zstd's default limit of 128 MiB of memory."""


class Decompressed(io.RawIOBase):
    """The decompressed stream of a ``.gz`` or ``.zst`` file. A read raises ``DamagedFile`` once all bytes
    before the damage have been read. A gzip file may have several members and NUL bytes at its end,
    as the gzip program allows."""

    def __init__(self, source: Any, path: str) -> None:
        self._source, self._path = source, path
        zstd = compression(path) == "zstd"
        self._decoder: Any = _Zstd(source) if zstd else gzip.GzipFile(fileobj=source, mode="rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._decoder.read1(min(len(buffer), io.DEFAULT_BUFFER_SIZE))
        except (OSError, EOFError, zlib.error) as problem:
            if getattr(problem, "errno", None):  # of the disk or the network, not of the decoder
                raise
            name = without_secrets(self._path)
            if "too much memory" in str(problem):
                raise TooLargeWindow(
                    f"{name}: zstd window above 128 MiB; recompress it without --long"
                ) from None
            raise DamagedFile(f"{name}: damaged compressed data: {problem}") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._decoder.close()
            self._source.close()
        super().close()


class _Zstd:
    """Decompresses with pyarrow, which, unlike other Python bindings, detects a truncated zstd file."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._streams: list[Any] = []
        """Decoders, of which the last is in use. The others are kept because a deleted decoder closes the
        source."""
        self._position = 0
        """Number of decompressed bytes that were returned."""
        self._by_byte = False
        self._open()

    def _open(self) -> None:
        import pyarrow as pa

        self._streams.append(pa.CompressedInputStream(pa.PythonFile(self._source, "r"), "zstd"))

    def read1(self, size: int) -> Any:
        """Returns at most ``size`` bytes. A failed read of pyarrow loses the bytes that it has decoded. They
        are then read again one by one."""
        try:
            # Not pyarrow's read(), which leaks memory if it fails.
            data = self._streams[-1].read_buffer(1 if self._by_byte else size)
        except OSError:
            if self._by_byte:
                raise
            self._restart()
            return self.read1(size)
        self._position += len(data)
        return memoryview(data).cast("B")

    def _restart(self) -> None:
        """Decodes the file again up to the failed read, after which reads are of one byte each."""
        self._by_byte = True
        self._source.seek(0)
        self._open()
        left = self._position
        while left > 0 and (data := self._streams[-1].read_buffer(min(left, 1 << 16))):
            left -= len(data)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
