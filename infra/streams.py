"""Files as streams of bytes: remote ones in ranges, compressed ones decompressed."""

from __future__ import annotations

import io
import os
from typing import Any

from infra import remote
from infra.errors import DamagedFile


class RemoteFile(io.RawIOBase):
    """A remote file read in ranges, each a call of its own that is repeated when it fails or falls short.

    ``checked``: the reader knows the digest of the whole. Otherwise each range is read until two downloads
    of it agree.
    """

    def __init__(self, path: str, size: int, checked: bool = False) -> None:
        self._path, self._key, self._size, self._checked = path, remote.key_of(path), size, checked
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

        def whole() -> bytes:
            return bytes(remote.repeated(once, self._path))

        return whole() if self._checked else remote.agreed(whole, self._path)


class Decompressed(io.RawIOBase):
    """pyarrow's decompression: unlike other Python bindings it tells when a zstd file was cut short."""

    def __init__(self, source: Any, path: str) -> None:
        import pyarrow as pa

        kind = "gzip" if path.endswith(".gz") else "zstd"
        self._stream, self._path = pa.CompressedInputStream(pa.PythonFile(source, "r"), kind), path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read_buffer(len(buffer))  # read() leaks what it allocated when it fails
        except OSError as problem:
            raise DamagedFile(f"{remote.shown(self._path)}: damaged compressed data: {problem}") from None
        buffer[: len(data)] = memoryview(data).cast("B")
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
