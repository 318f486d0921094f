"""The stored top-k and logsumexp of a shard against its stored hidden states through the stored head.

Both sides come from the same forward pass, so they may differ by rounding only:

* the teacher's head ran in its own dtype (unit roundoff u: bfloat16 2^-9, float16 2^-12, float32 2^-24),
* hidden states were rounded once more (float16: 2^-12 relative; int8: half a step, 1/254 of the largest).

A logit is sum_d z_d w_vd with the layer norm's z. Independent relative errors u in its D terms add up to
u * |z| |w_v| / sqrt(D) on average over directions, and the result is rounded by u once more, hence

    tolerance = SAFETY * (u_teacher + u_stored) * (|z| max_v |w_v| / sqrt(D) + |logit|).

SAFETY leaves room for the roundings of dense, activation and layer norm before the decoder and for the
maximum over all logits of a shard; a real bfloat16 teacher (D = 384) needed between 2 and 4 of the 8.
Swapped, shifted or foreign numbers are off by far more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from offline_teacher.store.head import MlmHead
from offline_teacher.store.quantise import dequantise
from offline_teacher.store.reader import Shard
from offline_teacher.store.schema import Layout, shard_name
from offline_teacher.store.verify import Problem

SAFETY = 8.0
ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-24}
STORED_ROUNDOFF = {"float16": 2.0**-12, "int8": 1 / 254}
CHUNK_BYTES = 128 << 20
"""Of logits held at once."""


def deep_check(
    shard: Shard, head: MlmHead, layout: Layout, dtype: str = "bfloat16", positions: int | None = None
) -> list[Problem]:
    """Problems in top-k or logsumexp, at most one a column.

    ``dtype`` is the teacher's. ``positions``: check only this many, spread over the shard; None: all.
    [] for a layout without top-k or without hidden states, where there is nothing to compare.
    """
    if layout.top_k == 0 or layout.hidden_states == "none":
        return []
    rows, slots = np.nonzero(_used(shard, layout))
    if positions is not None and positions < len(rows):
        chosen = np.linspace(0, len(rows) - 1, positions).astype(np.int64)
        rows, slots = rows[chosen], slots[chosen]
    unit = ROUNDOFF[dtype] + STORED_ROUNDOFF[layout.hidden_states]
    chunk = max(1, CHUNK_BYTES // (4 * layout.vocab_size))
    found: dict[str, Problem] = {}
    for start in range(0, len(rows), chunk):
        here = rows[start : start + chunk], slots[start : start + chunk]
        for column, position, what in _compare(shard, head, layout, unit, *here):
            sequence = int(shard.sequence_ids[here[0][position]])
            where = f"sequence {sequence}, recorded position {here[1][position]}: {what}"
            name = f"shards/{shard_name(shard.replica, shard.index)}.arrow"
            found.setdefault(column, Problem(name, where, (shard.replica, shard.index), column))
    return list(found.values())


def recorded_count(shard: Shard, layout: Layout) -> int:
    """Recorded positions of a shard that have a token."""
    return int(_used(shard, layout).sum())


def _used(shard: Shard, layout: Layout) -> np.ndarray:
    """[n, P]"""
    if layout.positions == "masked":
        used: np.ndarray = shard.columns["masked_positions"] >= 0
        return used
    return np.arange(layout.length) < shard.columns["token_count"][:, None]


def _compare(
    shard: Shard, head: MlmHead, layout: Layout, unit: float, rows: np.ndarray, slots: np.ndarray
) -> Iterator[tuple[str, int, str]]:
    """(column, position in ``rows``, what) of the worst difference beyond its tolerance, by column."""
    hidden = shard.columns["hidden_states"][rows, slots]
    if layout.hidden_states == "int8":
        hidden = dequantise(hidden, shard.columns["hidden_scale"][rows, slots])
    z = head.transform(hidden.astype(np.float32))
    logits = z @ head.decoder_weight.T + head.decoder_bias  # [N, V]
    widest = np.linalg.norm(head.decoder_weight, axis=1).max() / np.sqrt(layout.hidden_size)
    base = SAFETY * unit * np.linalg.norm(z, axis=1) * widest  # [N]

    ids = shard.columns["topk_ids"][rows, slots].astype(np.int64)
    stored = shard.columns["topk_logits"][rows, slots].astype(np.float32)
    error = np.abs(np.take_along_axis(logits, ids, axis=1) - stored)
    yield from _worst(
        "topk_logits", error, base[:, None] + SAFETY * unit * np.abs(stored), "logits differ by"
    )

    peak = logits.max(axis=1, keepdims=True)
    for j, temperature in enumerate(layout.temperatures):
        total = np.log(np.exp((logits - peak) / temperature).sum(axis=1)) + peak[:, 0] / temperature
        error = np.abs(total - shard.columns["logsumexp"][rows, slots, j])
        allowed = (base + SAFETY * unit * np.abs(peak[:, 0])) / temperature
        yield from _worst("logsumexp", error[:, None], allowed[:, None], f"at T = {temperature:g} differs by")

    np.put_along_axis(logits, ids, -np.inf, axis=1)
    beyond = logits.max(axis=1) - stored[:, -1]
    allowed = base + SAFETY * unit * np.abs(stored[:, -1])
    yield from _worst("topk_ids", beyond[:, None], allowed[:, None], "leave out a logit larger by")


def _worst(column: str, error: np.ndarray, allowed: np.ndarray, what: str) -> Iterator[tuple[str, int, str]]:
    """``error`` and ``allowed`` [N, ...]."""
    excess = error - np.broadcast_to(allowed, error.shape)
    position, item = np.unravel_index(excess.argmax(), excess.shape)
    if not excess[position, item] <= 0:
        limit = np.broadcast_to(allowed, error.shape)[position, item]
        yield column, int(position), f"{what} {error[position, item]:.3g}, allowed is {limit:.2g}"
