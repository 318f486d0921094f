"""Arrays are lent to one shard at a time; a heap that was kept is given back."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from offline_teacher.shard_memory import ShardMemory

from offline_teacher.store.schema import Column

FREES_AND_SHRINKS = """
import gc
import numpy as np
from offline_teacher.shard_memory import Heap, _resident_bytes
heap, before = Heap(), _resident_bytes()
held = [np.ones(1 << 20, np.uint8) for _ in range(200)]
kept = held[100]
del held
gc.collect()
freed = _resident_bytes()
heap.shrink()
print(freed - before, _resident_bytes() - before)
"""


def _memory() -> ShardMemory:
    return ShardMemory(3, {"hidden_states": Column(np.dtype(np.float16), (2, 5))})


def test_arrays_are_lent_to_one_shard_at_a_time_and_used_again() -> None:
    memory = _memory()
    with memory.lent() as first, memory.lent() as second:
        assert first["hidden_states"].shape == (3, 2, 5)
        assert not np.shares_memory(first["hidden_states"], second["hidden_states"])
        addresses = {lent["hidden_states"].ctypes.data for lent in (first, second)}
    with memory.lent() as again:
        assert again["hidden_states"].ctypes.data in addresses


def test_arrays_come_back_from_a_shard_that_failed() -> None:
    memory = _memory()
    with pytest.raises(ValueError, match="NaN"), memory.lent() as lent:
        raise ValueError("NaN")
    with memory.lent() as again:
        assert again["hidden_states"] is lent["hidden_states"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_freed_memory_is_kept_until_the_heap_is_shrunk() -> None:
    output = subprocess.run(
        [sys.executable, "-c", FREES_AND_SHRINKS], capture_output=True, text=True, check=True
    ).stdout
    freed, shrunk = (int(word) for word in output.split())
    assert freed > 150 << 20
    assert shrunk < 50 << 20
