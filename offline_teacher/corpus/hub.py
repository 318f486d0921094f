"""Data sets of the Hugging Face hub as numbered rows, downloaded whole or streamed; local directories too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from infra.errors import DamagedFile, UserError, first_line
from infra.settings.sections import Corpus

ROWS = 1000
"""Of a downloaded data set, read at once."""
_SAVED = ("state.json", "dataset_dict.json")
"""Files that mark a directory written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""


def pieces(corpus: Corpus, split: str, part_bytes: int) -> Iterator[tuple[int, int, str]]:
    """(start, stop) of pieces of about ``part_bytes``, in rows, and a stamp of the whole split.

    A stream allows no random access to rows, so its pieces are its files.
    """
    data = _load(corpus.path[0], corpus.config, split, corpus.streaming)
    if corpus.streaming:
        yield from ((file, file + 1, f"{data.num_shards} files") for file in range(data.num_shards))
        return
    rows = len(data)
    count = max(1, min(rows, round(data.data.nbytes / part_bytes)))
    for piece in range(count):
        yield rows * piece // count, rows * (piece + 1) // count, f"{rows}:{data.data.nbytes}"


def row_count(corpus: Corpus) -> int | None:
    """Rows of the split according to the dataset's card; None if the card does not give them."""
    data = _load(corpus.path[0], corpus.config, corpus.split, corpus.streaming)
    counted = (data.info.splits or {}).get(corpus.split)
    return counted.num_examples or None if counted is not None else None


def name_of(corpus: Corpus, split: str, start: int) -> str:
    """The name, for messages, of the piece that begins at ``start``."""
    file = f", file {start + 1}" if corpus.streaming else ""
    return f"{corpus.path[0]}[{split}{file}]"


def rows(corpus: Corpus, split: str, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a piece. DamagedFile where its data are broken, UserError for anything else."""
    data = _load(corpus.path[0], corpus.config, split, corpus.streaming)
    number = 1 if corpus.streaming else start + 1
    found = iter(
        data.shard(data.num_shards, start)
        if corpus.streaming
        else _by_ranges(data, corpus.text_column, start, stop)
    )
    while True:
        try:
            row = next(found, None)
        except ValueError as error:  # what parsers of JSON, CSV and Parquet raise, pyarrow's too
            raise DamagedFile(f"{name_of(corpus, split, start)}, row {number}: {_why(error)}") from None
        except Exception as error:  # noqa: BLE001 - as in _load
            place = f"{name_of(corpus, split, start)}, row {number}"
            raise UserError(f"corpus.path: cannot read {place}: {_why(error)}") from None
        if row is None:
            return
        yield number, row
        number += 1


def _by_ranges(data: Any, column: str, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Rows with that column alone, ``ROWS`` at a time: one by one each takes ten times as long."""
    if column not in data.column_names:
        yield from ({} for _ in range(start, stop))
        return
    narrow = data.select_columns([column])
    for first in range(start, stop, ROWS):
        yield from ({column: value} for value in narrow[first : min(first + ROWS, stop)][column])


@lru_cache(maxsize=2)
def _load(name: str, config: str | None, split: str, streaming: bool) -> Any:
    import datasets

    try:
        if any(os.path.isfile(os.path.join(name, file)) for file in _SAVED):
            return _load_saved(name, split, streaming)
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # noqa: BLE001 - datasets and huggingface_hub raise a dozen unrelated types here
        raise UserError(
            f"corpus.path: cannot load data set {name!r} (config {config!r}, split {split!r}): {_why(error)}"
        ) from None


def _load_saved(directory: str, split: str, streaming: bool) -> Any:
    """Loads the output of ``save_to_disk``: all splits of a dataset, or one split, perhaps without a name."""
    import datasets

    if streaming:
        raise ValueError("what save_to_disk wrote cannot be streamed; set corpus.streaming: false")
    data = datasets.load_from_disk(directory)
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"its splits are {', '.join(data)}")
        return data[split]
    if split != str(data.split or "train"):
        raise ValueError(f"it is the split {data.split or 'train'}")
    return data


def _why(error: Exception) -> str:
    """The first line of the error's message, or of its cause's if it has none."""
    silent = str(error).startswith("An error occurred while generating the dataset")
    return first_line(error.__cause__ if silent and error.__cause__ else error)
