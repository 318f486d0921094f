"""Reads the samples of one split of a store, and opens a stream of batches over the split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from infra.files import storage
from infra.files.cache import Cache
from infra.settings.sections import Train
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.blocks import bytes_of_rows
from offline_teacher.store.numbering import PART_SHIFT
from offline_teacher.store.store import DamagedStore, Split, Store
from student_train.data.collate import TEXT_COLUMNS
from student_train.data.order import Locations, SampleOrder
from student_train.data.pinned_buffers import BufferPool
from student_train.data.stream import Allocate, Share, Stream, new_array

if TYPE_CHECKING:
    from student_train.engine.world import World


class Samples:
    """Random access to the samples of one split. Digests and value ranges are checked."""

    def __init__(self, store: Store, split: str, names: Sequence[str], cache: Cache | None = None) -> None:
        self.names = names
        self._reader = BlockReader(store, split, names, cache)
        self._root, self._split = store.root, split
        self._columns = {name: store.layout.columns()[name] for name in names}
        last, length = store.layout.vocab_size - 1, store.layout.length
        # Smallest and largest allowed value of a column, both inclusive.
        self._bounds = dict.fromkeys(("input_ids", "masked_labels", "topk_ids"), (0, last))
        self._bounds |= {"token_count": (1, length), "masked_positions": (-1, length - 1)}

    def gather(
        self, epoch: np.ndarray, block: np.ndarray, row: np.ndarray, allocate: Allocate = new_array
    ) -> Mapping[str, np.ndarray]:
        """Reads n samples, given by masking epoch, block and row, each int64 [n]. Returns column name ->
        C-contiguous array [n, *shape], made by ``allocate``. Raises DamagedStore if a digest does not match,
        or if an id or a position is out of range, because the kernels do not check them."""
        out = {
            name: allocate(name, (len(row), *column.shape), column.dtype)
            for name, column in self._columns.items()
        }
        places: dict[tuple[int, int], list[int]] = {}
        for place, key in enumerate(zip(epoch.tolist(), block.tolist(), strict=True)):
            places.setdefault(key, []).append(place)
        assert all(values.flags.c_contiguous for values in out.values())
        raw = {name: bytes_of_rows(values) for name, values in out.items()}
        for key, in_block in sorted(places.items()):
            self._reader.copy_rows(*key, row[in_block].tolist(), raw, in_block)
        for name, (low, high) in self._bounds.items():
            if name in out and not ((out[name] >= low) & (out[name] <= high)).all():
                raise DamagedStore(self._root, f"{self._split}: {name} holds numbers outside {low} to {high}")
        both = {"token_count", "masked_positions"} <= out.keys()
        if both and (out["masked_positions"] >= out["token_count"].reshape(-1, 1)).any():
            raise DamagedStore(self._root, f"{self._split}: masked_positions holds positions of padding")
        return out

    def fetch(self, epoch: int, block: int) -> None:
        """Downloads a block of a remote store into the cache of this machine, unless the cache has it."""
        self._reader.rows(epoch, block, slice(0, 0))


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
    """Opens the stream of this rank's batches from step ``start`` to the end of ``order``. ``columns``: the
    teacher's columns that the batches have; see `required_columns`."""
    names = [*(name for name in TEXT_COLUMNS if name in store.layout.columns()), *columns]
    remote = storage.is_remote(store.root)
    cache = Cache(train.cache_dir, train.cache_bytes) if remote else None
    share = Share(world.rank, world.size, train.micro_batch_size, train.prefetch)
    buffers = BufferPool(world.device, share.threads + 2) if world.device.type == "cuda" else None
    return Stream(
        Samples(store, split, names, cache), order, share, start, order.steps,
        masked_only=store.layout.positions == "masked" and train.teacher == "store",
        bfloat16=store.layout.hidden_states == "bfloat16", remote=remote, buffers=buffers,
    )  # fmt: skip


def sequence_names(split: Split, locations: Locations, count: int) -> list[str]:
    """Returns ``part/row`` of the sequences of the first ``count`` of these samples."""
    names = []
    for block, row in zip(locations.block[:count].tolist(), locations.row[:count].tolist(), strict=True):
        sequence = int(split.plan.sequence_ids(block)[row])
        names.append(f"{sequence >> PART_SHIFT}/{sequence & (1 << PART_SHIFT) - 1}")
    return names
