"""Returns a worker's free memory to the system. The settings of the allocator are in ``cluster/pool.py``."""

from __future__ import annotations

import ctypes
import os

GROWTH = 1.05
"""``shrink`` acts once resident memory exceeds this multiple of what the last ``shrink`` left."""


class Heap:
    """Batches of many shapes leave holes in the C library's heap, more with every shard."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._glibc = library if hasattr(library, "malloc_trim") else None  # other C libraries are left alone
        self._least = 0.0

    def shrink(self) -> None:
        """Returns free memory to the system if the process has grown by ``GROWTH`` since the last time."""
        if self._glibc is not None and _resident_bytes() > GROWTH * self._least:
            self._glibc.malloc_trim(0)
            self._least = _resident_bytes()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
