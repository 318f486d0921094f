"""Calls the compiled reduction of logits on a CPU, ``reduction_kernel.cpp``.

If it cannot be built, `reduction` uses slower tensor operations instead.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from infra.cpu import native

SOURCE = Path(__file__).with_suffix(".cpp")
FUNCTIONS = {torch.float32: "reduce_float32", torch.bfloat16: "reduce_bfloat16"}


def available() -> bool:
    """Whether the kernel can be used. The first call builds it."""
    return _library() is not None


def reduce_logits(
    logits: Tensor, top_k: int, temperatures: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `reduction.reduce_logits` describes, with the rows divided among torch's threads."""
    if logits.dtype not in FUNCTIONS:
        logits = logits.float()
    count, vocab_size = logits.shape
    assert logits.is_contiguous()
    assert 0 < top_k <= vocab_size
    ids = torch.zeros(count, top_k, dtype=torch.int64)
    values, sums = torch.full((count, top_k), torch.nan), torch.empty(count, len(temperatures))
    scales = torch.tensor(temperatures, dtype=torch.float32)
    function = getattr(_library(), FUNCTIONS[logits.dtype])

    def reduce(rows: slice) -> None:
        part = logits[rows]
        function(
            part.data_ptr(), len(part), vocab_size, top_k, scales.data_ptr(), len(temperatures),
            ids[rows].data_ptr(), values[rows].data_ptr(), sums[rows].data_ptr(),
        )  # fmt: skip

    native.in_threads(reduce, count, torch.get_num_threads())
    return ids, values, sums


@cache
def _library() -> ctypes.CDLL | None:
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    arguments = [pointer, integer, integer, integer, pointer, integer, pointer, pointer, pointer]
    slower = "top-k and logsumexp run uncompiled, several times slower"
    return native.load_library(SOURCE, slower, FUNCTIONS.values(), arguments)
