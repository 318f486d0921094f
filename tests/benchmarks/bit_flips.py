"""Flips single bits of files, one at a time, and counts what a reader of the files does about each."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

OUTCOMES = {
    "named": "noticed, sample named",
    "noticed": "noticed, no sample named",
    "silent": "silent wrong numbers",
    "unchanged": "no number changed",
}
"""Key of an outcome -> the same in words. A reader that notices a flip raises an error."""
Columns = Mapping[str, np.ndarray]


def count_outcomes(
    files: Sequence[Path], read: Callable[[], Columns], flips: int, seed: int = 0
) -> dict[str, int]:
    """Flips ``flips`` random bits, one at a time, and reads after each. Returns the number of flips with each
    outcome. ``files``: not empty; every one of their bits is equally likely. ``read``: opens the files and
    returns all columns."""
    expected, random = read(), np.random.default_rng(seed)
    ends = np.cumsum([path.stat().st_size for path in files])
    counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
    for place in random.integers(0, 8 * ends[-1], flips).tolist():
        number = int(np.searchsorted(ends, place // 8, side="right"))
        bit = place - 8 * int(ends[number] - files[number].stat().st_size)
        with flipped(files[number], bit):
            counts[outcome(read, expected)] += 1
    return dict(counts)


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """Flips a bit of the file, given by its number from the start of the file, and flips it back at the
    end."""
    file = os.open(path, os.O_RDWR)
    try:
        before = os.pread(file, 1, bit // 8)
        os.pwrite(file, bytes([before[0] ^ 1 << bit % 8]), bit // 8)
        try:
            yield
        finally:
            os.pwrite(file, before, bit // 8)
    finally:
        os.close(file)


def outcome(read: Callable[[], Columns], expected: Columns) -> str:
    """Reads once, and returns a key of ``OUTCOMES``. ``expected``: the columns of the undamaged files."""
    try:
        found = read()
    except Exception as error:
        return "named" if re.search(r"\bsample \d+", str(error)) else "noticed"
    return "unchanged" if _same(found, expected) else "silent"


def _same(found: Columns, expected: Columns) -> bool:
    """Returns whether all columns have the same dtypes, shapes and bytes."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == values.dtype
        and found[name].shape == values.shape
        and found[name].tobytes() == values.tobytes()
        for name, values in expected.items()
    )
