"""The relation loss in C++ for CPUs: calls ``native_relations.cpp``.

The formulas are those of `relations._chunk`, which runs on other devices, in other or mixed dtypes, and
without a C++ compiler. The arithmetic is float32 for all dtypes. Tests compare the two.

Axes: B sequences, L length, D width of the student, A relation heads.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from infra.cpu import native

SOURCE = Path(__file__).with_suffix(".cpp")
FUNCTIONS = {torch.float32: "relation_float32", torch.bfloat16: "relation_bfloat16"}


def usable(student: Tensor, teacher: Tensor) -> bool:
    """Whether ``summed_kl`` takes these devices and dtypes. The first such call builds the library."""
    alike = student.device.type == teacher.device.type == "cpu" and student.dtype == teacher.dtype
    return alike and student.dtype in FUNCTIONS and _library() is not None


def summed_kl(
    student: Tensor, teacher: Tensor, token_count: Tensor | None, heads: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns one relation's summed KL (float64 scalar), and its gradient [B, L, D] in the student's dtype.

    The gradient is None unless ``with_gradient``. For the other arguments see `relations._in_chunks`. The B A
    pairs of a sequence and a head are distributed over as many threads as torch uses. Every pair has its own
    sum, so the result does not depend on the number of threads.
    """
    b, length, width = student.shape
    student, teacher = student.contiguous(), teacher.contiguous()
    counts = torch.full((b,), length) if token_count is None else token_count.contiguous()
    assert (counts.dtype, counts.shape, teacher.shape[:2]) == (torch.int64, (b,), (b, length))
    assert width % heads == teacher.shape[2] % heads == 0
    gradient = torch.empty_like(student) if with_gradient else None
    kl = torch.empty(b * heads, dtype=torch.float64)
    function = getattr(_library(), FUNCTIONS[student.dtype])

    def work(pairs: slice) -> None:
        function(
            student.data_ptr(), teacher.data_ptr(), None if gradient is None else gradient.data_ptr(),
            counts.data_ptr(), length, heads, width, teacher.shape[2], pairs.start, pairs.stop, kl.data_ptr(),
        )  # fmt: skip

    native.in_threads(work, b * heads, torch.get_num_threads())
    return kl.sum(), gradient


@cache
def _library() -> ctypes.CDLL | None:
    arguments = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 6, ctypes.c_void_p]
    slower = "the relation loss runs uncompiled, slower"
    return native.load_library(SOURCE, slower, FUNCTIONS.values(), arguments)
