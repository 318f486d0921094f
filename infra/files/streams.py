"""Files as streams of bytes: remote ones in ranges, compressed ones decompressed."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from typing import Any

from infra.errors import DamagedFile
from infra.files import remote
from infra.files.os_errors import naming


class RemoteFile(io.RawIOBase):
    """A remote file read in ranges, each a call of its own that is repeated when it fails or falls short."""

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size = path, size
        self._at = 0

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
        data = remote_range(self._path, self._at, stop)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)


def remote_range(path: str, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a remote file in one request, repeated when it fails or falls short."""
    key = remote.key_of(path)

    def once() -> bytes:
        data = remote.call(path, "cat_file", key, start=start, end=stop, size=stop - start)
        if len(data) != stop - start:
            raise OSError(f"{len(data)} bytes came of {stop - start}")
        return bytes(data)

    return bytes(remote.repeated(once, path))


def compression(path: str) -> str | None:
    """``gzip`` or ``zstd`` as the name's suffix says, in capitals or not; None for any other."""
    name = path.lower()
    return "gzip" if name.endswith(".gz") else "zstd" if name.endswith(".zst") else None


def first_bytes(path: str, size: int, count: int) -> bytes:
    """Of the file as it lies there, not decompressed."""
    with (
        naming(path),
        RemoteFile(path, size) if remote.scheme(path) else open(path, "rb", buffering=0) as file,
    ):
        return file.read(count) or b""


def decompressed_beginning(data: bytes, path: str, count: int) -> bytes:
    """The first ``count`` bytes of a compressed file, or what its first bytes ``data`` give of them."""
    found = bytearray()
    with contextlib.suppress(DamagedFile), Decompressed(io.BytesIO(data), path) as stream:
        while len(found) < count and (piece := stream.read(min(count - len(found), 1 << 20))):
            found += piece
    return bytes(found)


def expansion(path: str, size: int, count: int) -> float:
    """Bytes of text to one byte of a compressed file, in its first ``count`` bytes; at least 1."""
    head = first_bytes(path, size, count)
    return max(1.0, len(decompressed_beginning(head, path, 1 << 40)) / max(1, len(head)))


class TooLargeWindow(DamagedFile):
    """A zstd file that takes more memory to decompress than zstd allows by itself: 128 MiB."""


class Decompressed(io.RawIOBase):
    """A ``.gz`` or ``.zst`` file. It gives all bytes before a damage, and then raises ``DamagedFile``.

    A gzip file may have several members, and zero bytes after the last one, as gzip itself allows.
    """

    def __init__(self, source: Any, path: str) -> None:
        self._source, self._path = source, path
        self._decoder: Any = (
            _Zstd(source) if compression(path) == "zstd" else gzip.GzipFile(fileobj=source, mode="rb")
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._decoder.read1(min(len(buffer), io.DEFAULT_BUFFER_SIZE))
        except (OSError, EOFError, zlib.error) as problem:
            name = remote.shown(self._path)
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
    """pyarrow's decompression: unlike other Python bindings it tells when a zstd file was cut short."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._streams: list[Any] = []
        """Decoders; the last one is read. The others are kept, because deleting one would close the
        source."""
        self._at = 0
        self._by_byte = False
        self._open()

    def _open(self) -> None:
        import pyarrow as pa

        self._streams.append(pa.CompressedInputStream(pa.PythonFile(self._source, "r"), "zstd"))

    def read1(self, size: int) -> Any:
        """At most ``size`` bytes. A read that fails loses what it has decoded: it is made again, by bytes."""
        try:
            data = self._streams[-1].read_buffer(1 if self._by_byte else size)  # read() leaks when it fails
        except OSError:
            if self._by_byte:
                raise
            self._return()
            return self.read1(size)
        self._at += len(data)
        return memoryview(data).cast("B")

    def _return(self) -> None:
        """Decodes the file again up to the read that failed, and goes on from there byte by byte."""
        self._by_byte = True
        self._source.seek(0)
        self._open()
        left = self._at
        while left > 0 and (data := self._streams[-1].read_buffer(min(left, 1 << 16))):
            left -= len(data)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
