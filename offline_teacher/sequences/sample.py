"""Samples evenly spaced places of a corpus, and estimates from them the size of the whole corpus.

Only names, sizes and footers of other text are read, so that a laptop can sample a corpus of any size. In
plain text a place is a range of bytes. A document belongs to the range in which it starts, so tokens per byte
is an unbiased estimate. Compressed files and files that are one document are read from their start. Parquet
and hub datasets are read row by row from the start of some of their parts.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa

from infra.errors import DamagedFile, UserError
from infra.files import storage
from infra.files.streams import compression
from infra.settings.sections import Corpus, Sequences
from offline_teacher.corpus import hub
from offline_teacher.corpus.documents import cut_text, documents, row_texts
from offline_teacher.corpus.partition import Part, Span, needs_sequential_read, parquet_rows, parts
from offline_teacher.corpus.problems import Problems
from offline_teacher.sequences.packing import TextStatistics, pack
from offline_teacher.sequences.tokenizer import Encoder

Item = TypeVar("Item")

PLACES = 16
"""Number of places that are read."""
PLACE_BYTES = 1 << 14
"""Number of bytes of text that are read at one place."""
MAX_FOOTERS = 256
"""Maximum number of Parquet files whose rows are counted; others are taken to have as many rows per byte."""


@dataclass(frozen=True)
class Place:
    """The texts read at one place."""

    texts: list[str]
    units: float
    """Number of bytes or rows of the corpus that contain the texts."""
    weight: float
    """Weight of the place in the estimate: bytes of text, rows of a Parquet part, or 1 for a hub part."""


@dataclass(frozen=True)
class CorpusSample:
    """Sequences from some places, and the size of the whole corpus, extrapolated from them."""

    input_ids: np.ndarray
    """[n, L]"""
    token_count: np.ndarray
    """[n]"""
    size: float
    """Size of the whole corpus, in ``unit``."""
    read: float
    """Size of the text that was read, in ``unit``."""
    unit: str
    """``bytes`` (of the files) or ``rows``."""
    places: int
    """Number of places that were read."""
    tokens: int
    """Number of tokens of one masking epoch of the whole corpus, special tokens included."""
    sequences: int
    """Number of sequences of one masking epoch of the whole corpus."""
    relative_error: float
    """Standard error of ``tokens``, relative to it, estimated from the differences between places."""
    problems: Problems

    @property
    def exact(self) -> bool:
        """Whether the whole corpus was read, so that nothing is extrapolated."""
        return self.read >= self.size


def sample_corpus(corpus: Corpus, settings: Sequences, encoder: Encoder) -> CorpusSample:
    """Samples the corpus. Raises UserError if a file is missing or no usable document was read."""
    problems = Problems(corpus.strict)
    if corpus.source == "hub":
        unit, (size, places) = "rows", _hub_places(corpus, settings.part_bytes, problems)
    elif corpus.source == "parquet":
        unit, (size, places) = "rows", _parquet_places(corpus, settings.part_bytes, problems)
    else:
        all_parts = parts(corpus, settings.part_bytes)
        unit, (size, places) = "bytes", _text_places(corpus, settings, problems, all_parts)
    inputs, counts = _sequences(places, encoder, settings, problems)
    units = [place.units for place in places]
    tokens = np.array([count.sum() for count in counts], np.float64)
    rate, error = _rate(tokens, np.array(units), np.array([place.weight for place in places]))
    tokens_per_sequence = float(tokens.sum()) / sum(map(len, counts))
    if settings.packing == "packed" and sum(units) < size:
        tokens_per_sequence = settings.length  # only sampling makes the last sequence of a place short
    return CorpusSample(
        input_ids=np.concatenate(inputs),
        token_count=np.concatenate(counts),
        size=size,
        read=min(sum(units), size),
        unit=unit,
        places=len(units),
        tokens=max(1, round(size * rate)),
        sequences=max(1, round(size * rate / tokens_per_sequence)),
        relative_error=0.0 if sum(units) >= size else error,
        problems=problems,
    )


def sample_sequences(
    corpus: Corpus, settings: Sequences, encoder: Encoder, all_parts: list[Part]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sequences [n, L] of the sampled places and their token counts [n], without an estimate.
    ``all_parts``: the parts of the corpus or of its held-out text."""
    problems = Problems(corpus.strict)
    if corpus.source in ("hub", "parquet"):
        places = _row_places(all_parts, corpus, problems)
    else:
        places = _text_places(corpus, settings, problems, all_parts)[1]
    inputs, counts = _sequences(places, encoder, settings, problems)
    return np.concatenate(inputs), np.concatenate(counts)


def _sequences(
    places: list[Place], encoder: Encoder, settings: Sequences, problems: Problems
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns for each place its sequences [n, L] and their token counts [n]. UserError if none has any."""
    inputs, counts = [], []
    for place in places:
        none = np.empty((0, settings.length), encoder.dtype), np.empty(0, np.uint16)
        rows = [none, *pack(place.texts, encoder, settings, TextStatistics())]
        inputs.append(np.concatenate([ids for ids, _ in rows]))
        counts.append(np.concatenate([count for _, count in rows]))
    if not sum(map(len, counts)):
        summary = f": {problems.summary()}".removesuffix(": ")
        raise UserError(f"no usable document in {len(places)} places of the corpus{summary}")
    return inputs, counts


def _rate(tokens: np.ndarray, units: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Returns the ratio estimate of tokens per unit, and its relative standard error (NaN for one place).

    Each place's tokens are first scaled from its units to its weight. The formula of the error is in
    Cochran, Sampling Techniques, section 6.4.
    """
    tokens = tokens * (weights / np.maximum(units, 1))
    rate = float(tokens.sum() / max(weights.sum(), 1))
    n = len(tokens)
    spread = float(np.sqrt(((tokens - rate * weights) ** 2).sum() * n / max(n - 1, 1)))
    return rate, spread / max(float(tokens.sum()), 1.0) if n > 1 else math.nan


# Text and JSON lines, by bytes


def _text_places(
    corpus: Corpus, settings: Sequences, problems: Problems, all_parts: list[Part]
) -> tuple[float, list[Place]]:
    """Returns the size of all files in bytes, and the sampled places."""
    files = {span.path: int(span.stamp) for part in all_parts for span in part.spans}
    total = sum(files.values())
    starts, length = [0], total
    if total > PLACES * PLACE_BYTES:
        length = PLACE_BYTES
        starts = [int((i + 0.5) * total / PLACES - length / 2) for i in range(PLACES)]
    ranges = [part for start in starts for part in _ranges(files, start, start + length)]
    # Files that can only be read from their start -> bytes to read.
    sequential = Counter({path: 0 for path, _, _ in ranges if needs_sequential_read(corpus, path)})
    places = []
    for path, start, stop in ranges:
        if path in sequential:
            sequential[path] += stop - start
            continue
        span = Span(path, start, stop if stop < files[path] else None, str(files[path]))
        texts = _texts((span,), corpus, problems, 64 * PLACE_BYTES)
        places.append(Place(texts, stop - start, stop - start))
    for path, room in sequential.items():
        places.append(_file_start(path, files[path], max(room, PLACE_BYTES), corpus, settings, problems))
    if length < total and not any(place.texts for place in places):  # no document starts in these ranges
        first = _texts(all_parts[0].spans, corpus, problems, PLACE_BYTES)
        texts = [text[: PLACES * PLACE_BYTES] for text in first]
        read = sum(len(text.encode()) for text in texts)
        places = [Place(texts, read, read)]
    return total, places


def _ranges(files: dict[str, int], start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Yields (path, start, stop) of each file's share of bytes [start, stop) of the concatenated files."""
    file_start = 0
    for path, size in files.items():
        if file_start < stop and start < file_start + size:
            yield path, max(start - file_start, 0), min(stop - file_start, size)
        file_start += size


def _file_start(
    path: str, size: int, room: int, corpus: Corpus, settings: Sequences, problems: Problems
) -> Place:
    """Returns the first ``room`` bytes of a file's (decompressed) text; its units are bytes of the file."""
    raw = b""
    with contextlib.suppress(DamagedFile), storage.open_binary(path) as stream:
        raw = stream.read(room + 1)
    if len(raw) <= room:
        return Place(_texts((Span(path, 0, None, str(size)),), corpus, problems, room), size, size)
    raw = raw[:room]
    codec = compression(path)
    # Compressing the text again estimates how many bytes of the compressed file it came from.
    units = room if codec is None else len(pa.compress(raw, codec=codec, asbytes=True))
    if corpus.source == "text" and corpus.document == "file":
        units = units if settings.packing == "packed" else size
        return Place([raw.decode(errors="ignore")], units, units)
    return Place(_texts((Span(path, 0, room, str(size)),), corpus, problems, 64 * room), units, units)


def _texts(spans: tuple[Span, ...], corpus: Corpus, problems: Problems, room: int) -> list[str]:
    """Returns the first documents of spans, until ``room`` characters are read."""
    texts = []
    for text in documents(Part(spans), corpus, problems):
        texts.append(text)
        room -= len(text)
        if room <= 0:
            break
    return texts


# Parquet and hub, by rows


def _parquet_places(corpus: Corpus, part_bytes: int, problems: Problems) -> tuple[float, list[Place]]:
    """Returns the (estimated) number of rows of all files, and the sampled places."""
    all_parts = parts(corpus, part_bytes)
    files = {span.path: int(span.stamp) for part in all_parts for span in part.spans}
    counted = _evenly_spaced(list(files), MAX_FOOTERS)
    with ThreadPoolExecutor(16) as pool:
        rows = sum(pool.map(parquet_rows, counted))
    rows = round(rows * sum(files.values()) / max(1, sum(files[path] for path in counted)))
    return rows, _row_places(all_parts, corpus, problems)


def _hub_places(corpus: Corpus, part_bytes: int, problems: Problems) -> tuple[float, list[Place]]:
    """Returns the number of rows of the dataset, and the sampled places.

    Streams the dataset, whatever the recipe says, to avoid a full download. If the dataset's card does not
    give the number of rows, it is downloaded, or UserError is raised if ``corpus.streaming`` is set.
    """
    rows, streamed = None, replace(corpus, streaming=True)
    with contextlib.suppress(UserError):  # e.g. a slice of a split cannot be streamed
        rows = hub.row_count(streamed)
    if rows is None:
        if corpus.streaming:
            raise UserError(
                f"corpus.path: the card of {corpus.path[0]} does not give the number of rows, so the size of"
                " the corpus is unknown; set corpus.streaming=false"
            )
        streamed = corpus
    all_parts = parts(streamed, part_bytes)
    if rows is None:
        rows = all_parts[-1].spans[-1].stop
    assert rows is not None
    return rows, _row_places(all_parts, streamed, problems)


def _row_places(all_parts: Sequence[Part], corpus: Corpus, problems: Problems) -> list[Place]:
    chosen = _evenly_spaced(all_parts, PLACES)
    places = []
    for part in chosen:
        texts: list[str] = []
        room, rows = PLACES * PLACE_BYTES // len(chosen), 0
        for text in row_texts(part, corpus, problems):
            rows += 1
            texts += cut_text(text or "")
            room -= len(text or "")
            if room <= 0:
                break
        weight = 1
        if corpus.source == "parquet":
            weight = sum(parquet_rows(span.path, span.start, span.stop) for span in part.spans)
        places.append(Place(texts, rows, weight))
    return places


def _evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Returns at most ``count`` of the items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]
