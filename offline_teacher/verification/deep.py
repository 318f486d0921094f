"""``verify --deep``: compares stored top-k and logsumexp with those replayed from stored hidden states.

The pass computed both from the same hidden states, so they differ only by rounding:

* the teacher's top layers and head ran in its dtype (roundoff u_teacher, see ``ROUNDOFF``);
* the stored hidden states were rounded once more (roundoff u_stored, see ``STORED_ROUNDOFF``). For int8 that
  is half a step, 1/254 of the largest number; twice as much is allowed, as most numbers are far smaller.

A logit is sum_d z_d w_vd with the decoder's input z [E] and the output embedding w_v of token v. Independent
relative errors u of its E terms add up to about u * |z| |w_v| / sqrt(E), and the logit is rounded by u once
more. So, for n replayed layers,

    tolerance = SAFETY * (1 + LAYER n) * (u_teacher + u_stored) * (|z| max_v |w_v| / sqrt(E) + |logit|)

SAFETY covers roundings before the decoder, and the maximum over all logits of a task; docs/teacher.md says
how much of it was needed. Swapped or shifted numbers differ by far more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.console import progress
from infra.errors import UserError
from offline_teacher.inputs.stored_teacher import decoder_input, stored_top
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.schema import Columns, Layout
from offline_teacher.store.store import Store
from offline_teacher.verification.verify_task import Finding

if TYPE_CHECKING:
    from offline_teacher.models.replay import Replay

SAFETY = 8.0
LAYER = 2.0
"""Tolerance that each replayed layer adds, relative to the tolerance without replayed layers."""
ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-24}
STORED_ROUNDOFF = {"float16": 2.0**-12, "bfloat16": 2.0**-9, "int8": 1 / 127}
CHUNK_BYTES = 128 << 20
"""Largest number of bytes of logits in memory at once."""
TEXT = ("token_count", "masked_positions")


def deep_check(store: Store, positions: int) -> Iterator[Finding]:
    """Yields at most one finding per task and column. ``positions``: number compared in each task."""
    layout = store.layout
    if layout.top_k == 0 or layout.hidden_states == "none":
        print("deep: nothing to compare, the store does not hold both top-k and hidden states")
        return
    try:
        roundoff = ROUNDOFF[store.fingerprint["recipe"]["teacher"]["dtype"]]
    except (KeyError, TypeError):  # another writer
        what = f"{store.root}: --deep needs recipe.teacher.dtype in the store's fingerprint"
        raise UserError(what) from None
    roundoff += STORED_ROUNDOFF[layout.hidden_states]
    replay = stored_top(store)
    if replay is None:
        raise UserError(f"{store.root}: its teacher has no masked-LM head; leave out --deep, which needs one")
    wanted = [n for n in layout.data_columns() if n in TEXT or n.startswith(("topk", "logsum", "hidden"))]
    readers = {split: BlockReader(store, split, wanted) for split in store.splits}
    tasks, counted = store.tasks(), 0
    with progress(len(tasks), "tasks", "deep") as shown:
        for split, task in tasks:
            samples = min(task.samples, math.ceil(positions / layout.recorded))
            chosen = np.unique(np.linspace(0, task.samples - 1, samples).astype(np.int64))
            columns = readers[split].task_rows(task, chosen)
            rows, slots = (axis[:positions] for axis in np.nonzero(layout.used_slots(columns)))
            counted += len(rows)
            for column, index, problem in _compare(layout, replay, roundoff, columns, rows, slots):
                sequence = task.sequence_ids()[chosen[rows[index]]]
                where = f"sequence {sequence}, recorded position {slots[index]}"
                yield Finding.of_task(split, task, column, f"{where}: {problem}")
            shown.advance()
    print(f"deep: {counted:,} recorded positions of {len(tasks):,} tasks compared")


def _compare(
    layout: Layout, replay: Replay, roundoff: float, columns: Columns, rows: np.ndarray, slots: np.ndarray
) -> Iterator[tuple[str, int, str]]:
    """Yields (column, index in ``rows``, problem) of the largest excess over the tolerance in each column."""
    z = decoder_input(layout, replay, columns, rows, slots)
    weight, bias = replay.decoder_weight, replay.decoder_bias
    largest_weight = float(weight.norm(dim=1).max()) / math.sqrt(weight.shape[1])
    share = SAFETY * (1 + LAYER * layout.replay_layers) * roundoff
    worst: dict[str, tuple[float, int, str]] = {}
    chunk = max(1, CHUNK_BYTES // (4 * layout.vocab_size))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        logits = (z[part] @ weight.T + bias).numpy()
        base = share * z[part].norm(dim=1).numpy() * largest_weight
        stored = {n: columns[n][rows[part], slots[part]] for n in columns if n.startswith(("topk", "logsum"))}
        for column, error, allowed, words in _errors(layout, logits, stored, base, share):
            excess = (error - allowed).max(axis=1)
            row = int(excess.argmax())
            if not excess[row] <= worst.get(column, (0.0,))[0]:
                item = int((error - allowed)[row].argmax())
                numbers = f"{error[row, item]:.3g}, allowed is {allowed[row, item]:.2g}"
                worst[column] = float(excess[row]), start + row, f"{words} {numbers}"
    for column, (_, index, problem) in worst.items():
        yield column, index, problem


def _errors(
    layout: Layout, logits: np.ndarray, stored: dict[str, np.ndarray], base: np.ndarray, share: float
) -> Iterator[tuple[str, Any, Any, str]]:
    """Yields (column, error [N, items], tolerance [N, items], words of the problem before both numbers)."""
    ids, top = stored["topk_ids"].astype(np.int64), stored["topk_logits"].astype(np.float32)
    error = np.abs(np.take_along_axis(logits, ids, axis=1) - top)
    yield "topk_logits", error, base[:, None] + share * np.abs(top), "logits differ by"
    peak = logits.max(axis=1, keepdims=True)
    for j, temperature in enumerate(layout.temperatures):
        total = np.log(np.exp((logits - peak) / temperature).sum(axis=1)) + peak[:, 0] / temperature
        error = np.abs(total - stored["logsumexp"][:, j])[:, None]
        allowed = ((base + share * np.abs(peak[:, 0])) / temperature)[:, None]
        yield "logsumexp", error, allowed, f"at T = {temperature:g} differs by"
    np.put_along_axis(logits, ids, -np.inf, axis=1)
    beyond = (logits.max(axis=1) - top[:, -1])[:, None]
    yield "topk_ids", beyond, (base + share * np.abs(top[:, -1]))[:, None], "leave out a logit larger by"
