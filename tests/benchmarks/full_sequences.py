"""Makes stores of full-length sequences and plausible random teacher outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from offline_teacher.store.schema import Layout, Plan
from offline_teacher.store.store import Store
from tests.benchmarks.bench_store import plausible_teacher
from tests.store.synthetic import FIRST_WORD, SPECIAL, Columns, make_store


def full_store(
    directory: str,
    layout: Layout,
    sequences: int,
    config: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> Store:
    """Returns a finished store with one task. ``config`` and ``weights``: the teacher's configuration and
    weights, for benchmarks that use them."""
    plan = Plan.from_bytes(layout, 1, sequences)
    weights = weights or {"none": np.zeros(1, np.float32)}
    return make_store(
        directory, layout, {"train": (sequences,)}, plan, teacher=full_teacher, config=config, weights=weights
    )


def full_teacher(layout: Layout, columns: Columns, random: np.random.Generator) -> None:
    """Replaces the text by full-length random words, of which a seventh are masked, and adds teacher
    outputs."""
    full_text(layout, columns, random)
    plausible_teacher(layout, columns, random)


def full_text(layout: Layout, columns: Columns, random: np.random.Generator) -> None:
    """Replaces the text by full-length random words, of which ``layout.masked`` are masked."""
    ids, slots = columns["input_ids"], columns["masked_positions"]
    ids[:] = random.integers(FIRST_WORD, layout.vocab_size, ids.shape)
    ids[:, 0], ids[:, -1] = SPECIAL.cls, SPECIAL.sep
    columns["token_count"][:] = layout.length
    slots[:] = np.sort(random.random((len(ids), layout.length - 2)).argsort(1)[:, : layout.masked], 1) + 1
    columns["masked_labels"][:] = np.take_along_axis(ids, slots.astype(np.int64), 1)
    assert SPECIAL.mask is not None
    np.put_along_axis(ids, slots.astype(np.int64), SPECIAL.mask, 1)
