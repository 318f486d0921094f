"""Parquet files as rows of one column; whatever is wrong with one is a ``DamagedFile``."""

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
    """Opens a file that is compressed as a whole, through a temporary file because it allows no seeking."""
    with contextlib.ExitStack() as files:
        stream: IO[bytes] = files.enter_context(storage.open_binary(path))
        if compression(path) is not None:
            packed, stream = stream, files.enter_context(tempfile.TemporaryFile())
            with reporting_os_errors(tempfile.gettempdir()):
                shutil.copyfileobj(packed, stream, storage.CHUNK)
        yield ParquetRows(path, stream)


class ParquetRows:
    """An open file. Reads the footer at once; raises DamagedFile if that fails."""

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        self._path = path
        with self._damage():
            self._file = pq.ParquetFile(stream)
            metadata = self._file.metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            self.group_bytes = [int(group.total_byte_size) for group in groups]
            self.group_rows = [int(group.num_rows) for group in groups]
            self.columns = list(self._file.schema_arrow.names)

    def cells(self, column: str, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """(row, counted from 1 in the file; value) of these row groups, until the first damage.

        Bytes of a string that are not UTF-8 come as lone surrogates.
        """
        for group in range(start, stop):
            row = 1 + sum(self.group_rows[:group])
            for values in self._batches(column, group):
                yield from enumerate(values, start=row)
                row += len(values)

    def _batches(self, column: str, group: int) -> Iterator[list[Any]]:
        with self._damage():
            batches = self._file.iter_batches(ROWS_AT_ONCE, [group], [column])
        while True:
            with self._damage():
                batch = next(batches, None)
                values = None if batch is None else _values(batch.column(0))
            if values is None:
                return
            yield values

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None):  # of the disk, not of the content
                raise
            raise DamagedFile(f"{self._path}: not a Parquet file, or a damaged one ({error})") from None


def _values(cells: pa.Array) -> list[Any]:
    try:
        return list(cells.to_pylist())
    except UnicodeDecodeError:
        raw = cells.cast(pa.binary()).to_pylist()
        return [value and value.decode(errors="surrogateescape") for value in raw]
