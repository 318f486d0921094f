"""A worker's memory from shard to shard: what is given back to the system and faulted in again costs time.

Measured with an encoder of 384 dimensions that takes 30 us a token, storing its hidden states alone: new
arrays for every shard and glibc's settings make a pass 3 to 15 % slower (two runs of each in turn).
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Numbers of glibc's malloc.h."""
MMAP_THRESHOLD = 32 << 20
"""Bytes from which memory is mapped and unmapped each time; the most that glibc takes."""
TRIM_THRESHOLD = (1 << 31) - 1
"""Free bytes at the heap's end from which it is given back: the largest int."""
GROWTH = 1.05
"""Resident memory over what was left by the last shrinking, from which shrinking is due again."""


class Heap:
    """The C library's heap, set to keep what a forward frees for the next one.

    Left to itself glibc gives every freed activation back to the system and faults it in again at the next
    layer; and it lets a thread started now have an arena of its own, of pieces of 64 MiB, each of which is
    given back when it is free, whatever the settings. The next thread to start has the main arena instead.
    What is kept has holes, as batches have many shapes, and more of them with every shard: hence ``shrink``.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._glibc = library if hasattr(library, "malloc_trim") else None  # another's heap is left alone
        self._least = 0.0
        if self._glibc is not None:
            self._glibc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
            self._glibc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
            self._glibc.mallopt(M_ARENA_MAX, 1)

    def shrink(self) -> None:
        """Gives free memory back to the system where the process has grown by ``GROWTH`` since last time."""
        if self._glibc is not None and _resident_bytes() > GROWTH * self._least:
            self._glibc.malloc_trim(0)
            self._least = _resident_bytes()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
