"""Checks that the values of a block are possible, before the block is written and again by ``verify``.

All checks are vectorised, and a block is small enough for the processor's cache. The pass makes most checks
of the teacher's values on the device instead (`inference.shard_columns`): a rule here needs its like there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from offline_teacher.store.schema import Layout, SpecialIds


@dataclass(frozen=True)
class BadValue:
    """An impossible value of a block."""

    column: str
    row: int
    """Number of the first row (sample) of the block that has such a value."""
    what: str
    """What is wrong: the end of a sentence about the column."""


def check_shapes(layout: Layout, columns: Mapping[str, np.ndarray]) -> Iterator[BadValue]:
    """Yields columns that are missing or unknown, or have another dtype or shape than the layout says."""
    expected = layout.data_columns()
    n = len(columns["sequence_id"]) if "sequence_id" in columns else 0
    for name in sorted(set(columns) - set(expected)):
        yield BadValue(name, 0, "is not a column of this layout")
    for name, column in expected.items():
        if name not in columns:
            yield BadValue(name, 0, "is missing")
            continue
        wanted = f"{column.dtype} {[n, *column.shape]}"
        found = f"{columns[name].dtype} {[*columns[name].shape]}"
        if found != wanted:
            yield BadValue(name, 0, f"must be {wanted}, not {found}")


def check_block(
    layout: Layout,
    special: SpecialIds,
    ids: np.ndarray,
    columns: Mapping[str, np.ndarray],
    text_only: bool = False,
) -> Iterator[BadValue]:
    """Yields impossible values of arrays [n, *shape]: the first row for each column and kind of problem.

    The arrays must have passed ``check_shapes``. ``ids``: the sequence ids that the plan expects, int64 [n].
    ``text_only``: check only the columns that do not come from the teacher.
    """
    yield from _first("sequence_id", columns["sequence_id"] != ids, "is not the planned sequence")
    yield from _check_tokens(layout, special, columns)
    if layout.masked:
        yield from _check_masked(layout, special, columns)
    if text_only:
        return
    if layout.positions == "pooled":
        yield from _first("embedding", _not_finite(columns["embedding"]), "is NaN or infinite")
        return
    unused = ~layout.used_slots(columns)
    if layout.top_k:
        yield from _check_topk(layout, columns, unused)
    if layout.hidden_states != "none":
        yield from _check_hidden(layout, columns, unused)


def _first(column: str, bad: np.ndarray, what: str) -> Iterator[BadValue]:
    """Yields a BadValue for the first row in which ``bad`` [n, ...] is true, if any."""
    if bad.any():
        yield BadValue(column, int(bad.reshape(len(bad), -1).any(axis=1).argmax()), what)


def _check_tokens(layout: Layout, special: SpecialIds, block: Mapping[str, np.ndarray]) -> Iterator[BadValue]:
    count, input_ids = block["token_count"], block["input_ids"]
    yield from _first("token_count", (count < 1) | (count > layout.length), "is not in 1 to length")
    yield from _first("input_ids", input_ids >= layout.vocab_size, "is not below the vocabulary size")
    padding = np.arange(layout.length) >= count[:, None]
    other = padding & (input_ids != special.pad)
    yield from _first("input_ids", other, "is not the pad token after token_count")


def _check_masked(layout: Layout, special: SpecialIds, block: Mapping[str, np.ndarray]) -> Iterator[BadValue]:
    positions, labels = block["masked_positions"], block["masked_labels"]
    token_count = block["token_count"][:, None].astype(np.int64)
    used = positions >= 0
    yield from _first("masked_labels", labels >= layout.vocab_size, "is not below the vocabulary size")
    yield from _first("masked_positions", (positions < -1), "is negative but not -1")
    yield from _first("masked_positions", positions >= token_count, "is not below token_count")
    ends = used & ((positions == 0) | (positions == token_count - 1))
    yield from _first("masked_positions", ends, "is at the first or last token, which are never masked")
    ascending = (np.diff(positions, axis=1) > 0) | ~used[:, 1:]
    ascending &= used[:, :-1] | ~used[:, 1:]
    yield from _first("masked_positions", ~ascending, "are not ascending, unused slots last")
    yield from _first("masked_labels", ~used & (labels != 0), "is not 0 in an unused slot")
    tokens = np.array([special.pad, special.cls, special.sep, special.mask], labels.dtype)
    yield from _first("masked_labels", used & np.isin(labels, tokens), "is a special token")


def _check_topk(layout: Layout, block: Mapping[str, np.ndarray], unused: np.ndarray) -> Iterator[BadValue]:
    ids, logits, logsumexp = block["topk_ids"], block["topk_logits"], block["logsumexp"]
    if _not_finite(logits).any():
        yield from _first("topk_logits", _not_finite(logits), "is NaN or infinite")
        return
    yield from _first("topk_ids", ids >= layout.vocab_size, "is not below the vocabulary size")
    if layout.top_k > 1:
        ordered = np.sort(ids[~unused], axis=-1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            ordered = np.sort(ids, axis=-1)
            twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1) & ~unused
            yield from _first("topk_ids", twice, "has the same token twice at one position")
        keys = _sort_keys(logits)
        yield from _first("topk_logits", keys[..., 1:] > keys[..., :-1], "is not descending")
    yield from _first("logsumexp", ~np.isfinite(logsumexp), "is NaN or infinite")
    # max/T <= logsumexp <= max/T + log V must hold, up to the rounding of the stored maximum to float16.
    temperatures = np.array(layout.temperatures, np.float32)
    largest = logits[..., :1].astype(np.float32) / temperatures
    tolerance = np.abs(largest) * 2**-10 + np.float32(1e-4)
    too_low = logsumexp < largest - tolerance
    too_high = logsumexp > largest + tolerance + math.log(layout.vocab_size)
    yield from _first("logsumexp", too_low & ~unused[..., None], "is below the largest logit")
    yield from _first("logsumexp", too_high & ~unused[..., None], "is above the largest logit + log(V)")
    for name in ("topk_ids", "topk_logits", "logsumexp"):
        yield from _unused_values(name, block[name], unused)


def _check_hidden(layout: Layout, block: Mapping[str, np.ndarray], unused: np.ndarray) -> Iterator[BadValue]:
    names = ["hidden_states"]
    if layout.hidden_states == "float16":
        yield from _first("hidden_states", _not_finite(block["hidden_states"]), "is NaN or infinite")
    elif layout.hidden_states == "bfloat16":
        bits = block["hidden_states"] & np.uint16(0x7F80)
        yield from _first("hidden_states", bits == np.uint16(0x7F80), "is NaN or infinite")
    else:
        names.append("hidden_scale")
        scale = block["hidden_scale"]
        yield from _first("hidden_scale", ~(np.isfinite(scale) & (scale >= 0)), "is not a finite number >= 0")
        lowest = block["hidden_states"] == -128
        yield from _first("hidden_states", lowest, "is -128, outside the symmetric range")
    for name in names:
        yield from _unused_values(name, block[name], unused)


def _unused_values(name: str, values: np.ndarray, unused: np.ndarray) -> Iterator[BadValue]:
    if unused.any() and values[unused].any():
        nonzero = (values != 0).reshape(*unused.shape, -1).any(axis=-1)
        yield from _first(name, nonzero & unused, "is not 0 at a position without a token")


def _not_finite(values: np.ndarray) -> np.ndarray:
    """Returns which float16 values are NaN or infinite. Tests the exponent bits, because numpy's float16
    arithmetic is slow."""
    return (values.view(np.uint16) & np.uint16(0x7C00)) == np.uint16(0x7C00)


def _sort_keys(values: np.ndarray) -> np.ndarray:
    """Returns int16 keys in the same order as the finite float16 values; -0 and 0 have the same key."""
    bits = values.view(np.int16)
    return np.where(bits < 0, np.int16(-32768) - bits, bits)
