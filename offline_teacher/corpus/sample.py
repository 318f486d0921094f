"""Reads and packs a sample of places spread over a corpus, and estimates from it the size of the whole
corpus.

Of the rest it reads only names, sizes and footers, so that a laptop can sample a corpus of any size. In plain
text a place is a range of bytes. A document belongs to the range in which it starts, so tokens per byte is an
unbiased estimate. Compressed files and files that are one document are read from their start. Parquet and hub
datasets are read row by row from the start of some of their parts.
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
from offline_teacher.sequences.packing import TextSeen, batched, pack
from offline_teacher.sequences.tokenizer import Encoder

Item = TypeVar("Item")

PLACES = 16
PLACE_BYTES = 1 << 14
"""Of text read at one place."""
FOOTERS = 256
"""Largest number of Parquet files whose rows are counted; the other files are assumed to be alike."""


@dataclass(frozen=True)
class Place:
    """What was read in one place: ``units`` bytes or rows of the corpus hold ``texts``."""

    texts: list[str]
    units: float
    weight: float
    """Its weight: rows of its part, bytes read, or 1 for a file of unknown size."""


@dataclass(frozen=True)
class CorpusSample:
    """Sequences of a few places, and the size of the whole corpus extrapolated from them."""

    input_ids: np.ndarray
    """[n, L]"""
    token_count: np.ndarray
    """[n]"""
    size: float
    """Of the whole corpus, in ``unit``s."""
    read: float
    unit: str
    """bytes (of the files) or rows."""
    places: int
    tokens: int
    """Of one masking epoch of the whole corpus, special tokens included: extrapolated unless ``exact``."""
    sequences: int
    relative_error: float
    """Standard error of ``tokens``, from how much the places differ."""
    problems: Problems

    @property
    def exact(self) -> bool:
        return self.read >= self.size


def sample_corpus(corpus: Corpus, settings: Sequences, encoder: Encoder) -> CorpusSample:
    """Raises UserError where a file is missing or nothing that was read can be used."""
    problems = Problems(corpus.strict)
    if corpus.source == "hub":
        unit, (size, places) = "rows", _hub_places(corpus, settings.part_bytes, problems)
    elif corpus.source == "parquet":
        unit, (size, places) = "rows", _parquet_places(corpus, settings.part_bytes, problems)
    else:
        listed = parts(corpus, settings.part_bytes)
        unit, (size, places) = "bytes", _text_places(corpus, settings, problems, listed)
    inputs, counts = _sequences(places, encoder, settings, problems)
    units = [place.units for place in places]
    tokens = np.array([count.sum() for count in counts], np.float64)
    rate, error = _rate(tokens, np.array(units), np.array([place.weight for place in places]))
    mean = float(tokens.sum()) / sum(map(len, counts))  # tokens a sequence
    if settings.packing == "packed" and sum(units) < size:
        mean = settings.length  # the short last sequence of each place comes from sampling
    return CorpusSample(
        input_ids=np.concatenate(inputs),
        token_count=np.concatenate(counts),
        size=size,
        read=min(sum(units), size),
        unit=unit,
        places=len(units),
        tokens=max(1, round(size * rate)),
        sequences=max(1, round(size * rate / mean)),
        relative_error=0.0 if sum(units) >= size else error,
        problems=problems,
    )


def sample_sequences(
    corpus: Corpus, settings: Sequences, encoder: Encoder, listed: list[Part]
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences [n, L] of the same places and their token counts [n], without a look at the rest.

    ``listed`` are the parts of the corpus or of its held-out text. UserError as of ``sample_corpus``.
    """
    problems = Problems(corpus.strict)
    if corpus.source in ("hub", "parquet"):
        places = _row_places(listed, corpus, problems)
    else:
        places = _text_places(corpus, settings, problems, listed)[1]
    inputs, counts = _sequences(places, encoder, settings, problems)
    return np.concatenate(inputs), np.concatenate(counts)


def _sequences(
    places: list[Place], encoder: Encoder, settings: Sequences, problems: Problems
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each place the packed sequences [n, L] and their token counts [n]; UserError where none has any."""
    inputs, counts = [], []
    for place in places:
        rows = list(pack(batched(iter(place.texts), TextSeen()), encoder, settings))
        inputs.append(
            np.concatenate([ids for ids, _ in rows] or [np.empty((0, settings.length), encoder.dtype)])
        )
        counts.append(np.concatenate([count for _, count in rows] or [np.empty(0, np.uint16)]))
    if not sum(map(len, counts)):
        found = problems.summary()
        raise UserError(
            f"no usable document in {len(places)} places of the corpus{': ' + found if found else ''}"
        )
    return inputs, counts


def _rate(tokens: np.ndarray, units: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Tokens per unit over all places, and the relative standard error of this ratio estimate.

    The formula is that of Cochran, Sampling Techniques, section 6.4. Each place's tokens are first scaled to
    its weight.
    """
    tokens = tokens * (weights / np.maximum(units, 1))
    rate = float(tokens.sum() / max(weights.sum(), 1))
    n = len(tokens)
    spread = float(np.sqrt(((tokens - rate * weights) ** 2).sum() * n / max(n - 1, 1)))
    return rate, spread / max(float(tokens.sum()), 1.0) if n > 1 else math.nan


# Text and JSON lines, by bytes


def _text_places(
    corpus: Corpus, settings: Sequences, problems: Problems, listed: list[Part]
) -> tuple[float, list[Place]]:
    files = {span.path: int(span.stamp) for part in listed for span in part.spans}
    total = sum(files.values())
    if total <= PLACES * PLACE_BYTES:
        starts, length = [0], total
    else:
        starts, length = (
            [int((i + 0.5) * total / PLACES - PLACE_BYTES / 2) for i in range(PLACES)],
            PLACE_BYTES,
        )
    ranges: list[tuple[str, int, int]] = []
    for start in starts:
        ranges += _ranges(files, start, start + length)
    whole = Counter({path: 0 for path, _, _ in ranges if needs_sequential_read(corpus, path)})
    found = []
    for path, start, stop in ranges:
        if path in whole:
            whole[path] += stop - start
            continue
        span = Span(path, start, stop if stop < files[path] else None, str(files[path]))
        texts = _texts(Part((span,)), corpus, problems, 64 * PLACE_BYTES)
        found.append(Place(texts, stop - start, stop - start))
    for path, room in whole.items():
        found.append(_head(path, files[path], max(room, PLACE_BYTES), corpus, settings, problems))
    if length < total and not any(place.texts for place in found):  # none of the long documents starts there
        texts = [text[: PLACES * PLACE_BYTES] for text in _texts(listed[0], corpus, problems, PLACE_BYTES)]
        read = sum(len(text.encode()) for text in texts)
        found = [Place(texts, read, read)]
    return total, found


def _ranges(files: dict[str, int], start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """The files, one behind the other, from byte ``start`` to ``stop``."""
    begin = 0
    for path, size in files.items():
        if begin < stop and start < begin + size:
            yield path, max(start - begin, 0), min(stop - begin, size)
        begin += size


def _head(path: str, size: int, room: int, corpus: Corpus, settings: Sequences, problems: Problems) -> Place:
    """The first ``room`` bytes of (decompressed) text of a file, and the bytes of the file that hold them."""
    raw = b""
    with contextlib.suppress(DamagedFile), storage.open_binary(path) as stream:
        raw = stream.read(room + 1)
    if len(raw) <= room:
        return Place(_texts(Part((Span(path, 0, None, str(size)),)), corpus, problems, room), size, size)
    raw = raw[:room]
    codec = compression(path)  # how much of such a file this was: as much as it takes when packed again
    units = room if codec is None else len(pa.compress(raw, codec=codec, asbytes=True))
    if corpus.source == "text" and corpus.document == "file":
        units = units if settings.packing == "packed" else size
        return Place([raw.decode(errors="ignore")], units, units)
    return Place(_texts(Part((Span(path, 0, room, str(size)),)), corpus, problems, 64 * room), units, units)


def _texts(part: Part, corpus: Corpus, problems: Problems, room: int) -> list[str]:
    """Documents from the part's start until ``room`` characters are read."""
    texts = []
    for text in documents(part, corpus, problems):
        texts.append(text)
        room -= len(text)
        if room <= 0:
            break
    return texts


# Parquet and hub, by rows


def _parquet_places(corpus: Corpus, part_bytes: int, problems: Problems) -> tuple[float, list[Place]]:
    listed = parts(corpus, part_bytes)
    files = {span.path: int(span.stamp) for part in listed for span in part.spans}
    counted = _spread(list(files), FOOTERS)
    with ThreadPoolExecutor(16) as pool:
        rows = sum(pool.map(parquet_rows, counted))
    rows = round(rows * sum(files.values()) / max(1, sum(files[path] for path in counted)))
    return rows, _row_places(listed, corpus, problems)


def _hub_places(corpus: Corpus, part_bytes: int, problems: Problems) -> tuple[float, list[Place]]:
    """Reads by streaming, whatever the recipe says, to avoid a full download. The number of rows must be
    known."""
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
    listed = parts(streamed, part_bytes)
    if rows is None:
        rows = listed[-1].spans[-1].stop
    assert rows is not None
    return rows, _row_places(listed, streamed, problems)


def _row_places(listed: Sequence[Part], corpus: Corpus, problems: Problems) -> list[Place]:
    chosen = _spread(listed, PLACES)
    found = []
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
        found.append(Place(texts, rows, weight))
    return found


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` of them, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]
