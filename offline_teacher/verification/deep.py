"""``verify --deep``: stored top-k and logsumexp against the stored hidden states, through the teacher's top.

Both sides come from one forward pass, so they may differ by rounding only:

* the teacher's top ran in its own dtype (unit roundoff u: bfloat16 2^-9, float16 2^-12, float32 2^-24),
* hidden states were rounded once more (float16 2^-12 and bfloat16 2^-9 of each number; int8 by half a step,
  1/254 of the largest, of which twice as much is allowed: most numbers are far smaller than the largest).

A logit is sum_d z_d w_vd with the decoder's input z [E]. Independent relative errors u in its E terms add up
to u * |z| |w_v| / sqrt(E) on average over directions, and the result is rounded by u once more, hence

    tolerance = SAFETY * (1 + LAYER n) * (u_teacher + u_stored) * (|z| max_v |w_v| / sqrt(E) + |logit|)

for n replayed layers. SAFETY leaves room for the roundings of dense, activation and norm before the decoder
and for the maximum over all logits of a task. A real teacher (6 x 384, n of 0 to 2, 4,096 positions a task)
needed at most 4 of the 8 with float16 states and 5 with int8. Swapped, shifted or foreign numbers are off by
far more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.console import progress
from infra.errors import UserError
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.paths import SHARDS
from offline_teacher.store.reader import Store
from offline_teacher.store.schema import Columns, Layout
from offline_teacher.stored_teacher import decoder_input, stored_top
from offline_teacher.verification.verify_task import Finding

if TYPE_CHECKING:
    from offline_teacher.models.replay import Replay

SAFETY = 8.0
LAYER = 2.0
"""What a replayed layer adds, of what the head alone is allowed."""
ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-24}
STORED_ROUNDOFF = {"float16": 2.0**-12, "bfloat16": 2.0**-9, "int8": 1 / 127}
CHUNK_BYTES = 128 << 20
"""Of logits held at once."""
TEXT = ("token_count", "masked_positions")


def deep_check(store: Store, positions: int) -> Iterator[Finding]:
    """At most one finding for each task and column. ``positions``: how many positions of a task to
    compare."""
    layout = store.layout
    if layout.top_k == 0 or layout.hidden_states == "none":
        print("deep: nothing to compare, the store does not hold both top-k and hidden states")
        return
    unit = _unit(store)
    replay = stored_top(store)
    if replay is None:
        raise UserError(
            f"{store.root}: its teacher has no masked-LM head, so that --deep cannot compare top-k"
        )
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
            for column, place, what in _compare(layout, replay, unit, columns, rows, slots):
                where = f"sequence {task.sequence_ids()[chosen[rows[place]]]}"
                where += f", recorded position {slots[place]}"
                file = f"{SHARDS}/{split}/{task.name}"
                yield Finding(file, f"{where}: {what}", split, task.name, column)
            shown.advance()
    print(f"deep: {counted:,} recorded positions of {len(tasks):,} tasks compared")


def _unit(store: Store) -> float:
    """Relative error that one rounding leaves; another writer's fingerprint may not tell the dtype."""
    try:
        dtype = store.fingerprint["recipe"]["teacher"]["dtype"]
    except (KeyError, TypeError):
        dtype = None
    if dtype not in ROUNDOFF:
        raise UserError(f"{store.root}: --deep needs recipe.teacher.dtype in the store's fingerprint")
    return ROUNDOFF[dtype] + STORED_ROUNDOFF[store.layout.hidden_states]


def _compare(
    layout: Layout, replay: Replay, unit: float, columns: Columns, rows: np.ndarray, slots: np.ndarray
) -> Iterator[tuple[str, int, str]]:
    """(column, place in ``rows``, what) of the worst difference beyond its tolerance, by column."""
    z = decoder_input(layout, replay, columns, rows, slots)
    weight, bias = replay.decoder_weight, replay.decoder_bias
    widest = float(weight.norm(dim=1).max()) / math.sqrt(weight.shape[1])
    share = SAFETY * (1 + LAYER * layout.replay_layers) * unit
    worst: dict[str, tuple[float, int, str]] = {}
    chunk = max(1, CHUNK_BYTES // (4 * layout.vocab_size))
    for start in range(0, len(rows), chunk):
        here = slice(start, start + chunk)
        logits = (z[here] @ weight.T + bias).numpy()
        base = share * z[here].norm(dim=1).numpy() * widest
        stored = {n: columns[n][rows[here], slots[here]] for n in columns if n.startswith(("topk", "logsum"))}
        for column, error, allowed, what in _errors(layout, logits, stored, base, share):
            excess = (error - allowed).max(axis=1)
            place = int(excess.argmax())
            if not excess[place] <= worst.get(column, (0.0,))[0]:
                item = int((error - allowed)[place].argmax())
                sizes = f"{error[place, item]:.3g}, allowed is {allowed[place, item]:.2g}"
                worst[column] = float(excess[place]), start + place, f"{what} {sizes}"
    for column, (_, place, words) in worst.items():
        yield column, place, words


def _errors(
    layout: Layout, logits: np.ndarray, stored: dict[str, np.ndarray], base: np.ndarray, share: float
) -> Iterator[tuple[str, Any, Any, str]]:
    """(column, error [N, items], what is allowed of it, words)."""
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
