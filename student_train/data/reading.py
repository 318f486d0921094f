"""A stream over one split of a store: which columns, from where, and what is kept of a remote store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infra import storage
from infra.sections import Train
from offline_teacher.store.reader import BlockReader, Store
from student_train.data.collate import TEXT
from student_train.data.order import SampleOrder
from student_train.data.stream import Share, Stream

if TYPE_CHECKING:
    from student_train.engine.engine import World


def open_stream(
    store: Store,
    split: str,
    columns: Sequence[str],
    order: SampleOrder,
    train: Train,
    world: World,
    *,
    start: int = 0,
) -> Stream:
    """The batches of this rank from step ``start`` to the end of ``order``, with the teacher's ``columns``."""
    text = [name for name in TEXT if name in store.layout.columns()]
    reader = BlockReader(store, split, [*text, *columns], train.cache_dir, train.cache_bytes)
    share = Share(
        world.rank,
        world.size,
        train.micro_batch_size,
        train.prefetch,
        pin=world.device.type == "cuda",
    )
    return Stream(
        reader,
        order,
        share,
        start,
        order.steps,
        masked_only=store.layout.positions == "masked",
        bfloat16=store.layout.hidden_states == "bfloat16",
        remote=storage.is_remote(store.root),
    )
