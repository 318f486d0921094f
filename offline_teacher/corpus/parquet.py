"""Reads the rows of one column of Parquet files. Raises DamagedFile if a file is damaged in any way."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import DamagedFile
from infra.files import storage
from infra.files.os_errors import reporting_os_errors
from infra.files.streams import compression

ROWS_AT_ONCE = 1024


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[ParquetRows]:
    """Opens a Parquet file. A file that is compressed as a whole is first decompressed to a temporary file,
    because compressed streams do not allow seeking."""
    with contextlib.ExitStack() as files:
        stream: IO[bytes] = files.enter_context(storage.open_binary(path))
        if compression(path) is not None:
            decompressing, stream = stream, files.enter_context(tempfile.TemporaryFile())
            with reporting_os_errors(tempfile.gettempdir()):
                shutil.copyfileobj(decompressing, stream, storage.CHUNK)
        yield ParquetRows(path, stream)


class ParquetRows:
    """An open Parquet file. The constructor reads the footer, and raises DamagedFile if it is damaged."""

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        self._path = path
        with self._damage_as_error():
            self._file = pq.ParquetFile(stream)
            metadata = self._file.metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            self.group_bytes = [int(group.total_byte_size) for group in groups]
            self.group_rows = [int(group.num_rows) for group in groups]
            self.columns = list(self._file.schema_arrow.names)

    def cells(self, column: str, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Yields (row number in the file, from 1, and value) of every row of row groups [start, stop).

        Bytes of a string that are not UTF-8 become lone surrogates. Raises DamagedFile at the first damage.
        """
        for group in range(start, stop):
            row = 1 + sum(self.group_rows[:group])
            for values in self._batches(column, group):
                yield from enumerate(values, start=row)
                row += len(values)

    def _batches(self, column: str, group: int) -> Iterator[list[Any]]:
        with self._damage_as_error():
            batches = self._file.iter_batches(ROWS_AT_ONCE, [group], [column])
        while True:
            with self._damage_as_error():
                batch = next(batches, None)
                values = None if batch is None else _values(batch.column(0))
            if values is None:
                return
            yield values

    @contextlib.contextmanager
    def _damage_as_error(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None):  # an error of the disk, not of the content
                raise
            raise DamagedFile(f"{self._path}: not a Parquet file, or a damaged one ({error})") from None


def _values(cells: pa.Array) -> list[Any]:
    """Returns the cells as Python values; bytes that are not UTF-8 become lone surrogates."""
    try:
        return list(cells.to_pylist())
    except UnicodeDecodeError:
        raw = cells.cast(pa.binary()).to_pylist()
        return [None if value is None else value.decode(errors="surrogateescape") for value in raw]
