"""Reads numbered rows of Hugging Face datasets: from the hub, downloaded or streamed, or from a directory."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from infra.errors import DamagedFile, NodeError, UserError, first_line
from infra.settings.sections import Corpus

ROWS_AT_ONCE = 1000
"""Number of rows of a downloaded dataset that are read at once, which is ten times as fast as one by one."""
_HTTP_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
_SAVED = ("state.json", "dataset_dict.json")
"""Files that mark a directory written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""


def pieces(corpus: Corpus, split: str, part_bytes: int) -> Iterator[tuple[int, int, str]]:
    """Yields (start, stop, size) of each piece into which a split is cut.

    A downloaded dataset is cut into ranges of rows [start, stop) of about ``part_bytes``. A stream allows no
    random access to rows, so each of its files is a piece: [start, stop) has the number of one file.
    ``size`` is a text with the size of the whole split, which shows most changes of the dataset.
    """
    dataset = _load(corpus.path[0], corpus.config, split, corpus.streaming)
    if corpus.streaming:
        files = dataset.num_shards
        yield from ((file, file + 1, f"{files} files") for file in range(files))
        return
    rows, size = len(dataset), dataset.data.nbytes
    count = max(1, min(rows, round(size / part_bytes)))
    for piece in range(count):
        yield rows * piece // count, rows * (piece + 1) // count, f"{rows}:{size}"


def row_count(corpus: Corpus) -> int | None:
    """Returns the number of rows that the dataset's card gives for the split, or None if it gives none."""
    dataset = _load(corpus.path[0], corpus.config, corpus.split, corpus.streaming)
    split = (dataset.info.splits or {}).get(corpus.split)
    return split.num_examples or None if split is not None else None


def piece_name(corpus: Corpus, split: str, start: int) -> str:
    """Returns a name, for messages, of the piece that begins at ``start``: of its file if streamed."""
    file = f", file {start + 1}" if corpus.streaming else ""
    return f"{corpus.path[0]}[{split}{file}]"


def rows(corpus: Corpus, split: str, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number, row) of a piece, as ``pieces`` describes it.

    Numbers count from 1: in the file if streamed, else in the split. A row maps column names to values.
    Raises DamagedFile if the data are damaged, NodeError if the hub, the network or the disk fails, and
    UserError if they cannot be read for another reason.
    """
    dataset = _load(corpus.path[0], corpus.config, split, corpus.streaming)
    if corpus.streaming:
        number, iterator = 1, iter(dataset.shard(dataset.num_shards, start))
    else:
        number, iterator = start + 1, _read_in_batches(dataset, corpus.text_column, start, stop)
    where = piece_name(corpus, split, start)
    while True:
        try:
            row = next(iterator, None)
        except ValueError as error:  # the parsers of JSON, CSV and Parquet raise ValueError; pyarrow's too
            if _is_about_columns(error):
                raise UserError(
                    f"corpus.path: the columns or types of {where} differ from those of the dataset's first"
                    f" file ({_reason(error)}); make them equal, or set corpus.source to jsonl or parquet and"
                    " corpus.path to the files"
                ) from None
            raise DamagedFile(f"{where}, row {number}: {_reason(error)}") from None
        except Exception as error:  # noqa: BLE001 - as in _load
            kind = NodeError if _is_node_failure(error) else UserError
            raise kind(f"corpus.path: cannot read {where}, row {number}: {_reason(error)}") from None
        if row is None:
            return
        yield number, row
        number += 1


def _is_node_failure(error: BaseException | None) -> bool:
    """Whether the hub, the network or the disk fails. The client of the hub raises its HTTP library's errors,
    also as the cause of an error that says that a file was not found."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            return True
        if type(error).__module__.startswith(_HTTP_LIBRARIES):
            return True
        if type(error).__name__ == "DatasetNotFoundError":  # its cause is the hub's answer 404
            return False
        error = error.__cause__
    return False


def _is_about_columns(error: BaseException) -> bool:
    """Whether the error means that a file's columns or types differ from the dataset's. Only the traceback
    shows this: the error was raised in a cast of ``datasets``."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name in ("table_cast", "cast_table_to_schema") for frame in frames)


def _read_in_batches(dataset: Any, column: str, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Yields rows [start, stop) with only this column; without it, empty rows."""
    if column not in dataset.column_names:
        yield from ({} for _ in range(start, stop))
        return
    selected = dataset.select_columns([column])
    for first in range(start, stop, ROWS_AT_ONCE):
        batch = selected[first : min(first + ROWS_AT_ONCE, stop)]
        yield from ({column: value} for value in batch[column])


@lru_cache(maxsize=2)
def _load(name: str, config: str | None, split: str, streaming: bool) -> Any:
    import datasets

    try:
        if any(os.path.isfile(os.path.join(name, file)) for file in _SAVED):
            return _load_saved(name, split, streaming)
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # noqa: BLE001 - datasets and huggingface_hub raise a dozen unrelated types here
        what = f"dataset {name!r} (config {config!r}, split {split!r})"
        kind = NodeError if _is_node_failure(error) else UserError
        raise kind(f"corpus.path: cannot load {what}: {_reason(error)}") from None


def _load_saved(directory: str, split: str, streaming: bool) -> Any:
    """Loads a split from a directory of ``save_to_disk``. A dataset saved without the name of its split is
    ``train``. Raises ValueError if there is no such split."""
    import datasets

    if streaming:
        raise ValueError("a dataset saved by save_to_disk cannot be streamed; set corpus.streaming: false")
    dataset = datasets.load_from_disk(directory)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"its splits are {', '.join(dataset)}")
        return dataset[split]
    if split != str(dataset.split or "train"):
        raise ValueError(f"it is the split {dataset.split or 'train'}")
    return dataset


def _reason(error: Exception) -> str:
    """Returns the first line of the error's message, or of its cause's if the message says nothing."""
    uninformative = str(error).startswith("An error occurred while generating the dataset")
    return first_line(error.__cause__ if uninformative and error.__cause__ else error)
