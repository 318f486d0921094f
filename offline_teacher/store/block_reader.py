"""Samples of a store by (masking epoch, block, rows): every one is checked before its numbers are returned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infra.cache import Cache
from offline_teacher.store.reader import Store

Rows = slice | np.ndarray


class BlockReader:
    """Reads columns of one split. Several threads may use one reader."""

    bytes_read: int
    """Bytes mapped and checked, or requested from an object store, so far."""
    requests: int
    """Ranges requested from an object store so far."""

    def __init__(self, store: Store, split: str, columns: Sequence[str], cache: Cache | None = None) -> None:
        """``cache`` keeps ranges of a remote store; by default the reader makes a private one."""

    def rows(self, epoch: int, block: int, rows: Rows | None = None) -> dict[str, np.ndarray]:
        """Column -> array [n, *shape] of these rows of a block (default: all), each checked.

        The arrays are read-only views if ``rows`` is a slice of step 1, else copies. bfloat16 comes as its
        bits in uint16. Raises DamagedStore, which names file, task, block, sample and column.
        """
        raise NotImplementedError
