"""KL with temperature and CE of the exact soft target in C++ for CPUs: calls ``native_kl.cpp``.

The formulas are those of `kl_loss.exact_kernel`, which runs on other devices, in other dtypes, and without
a C++ compiler. Tests compare the two.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from infra.cpu import native

SOURCE = Path(__file__).with_suffix(".cpp")
FUNCTIONS = {torch.float32: "exact_float32", torch.bfloat16: "exact_bfloat16"}


def usable(student: Tensor, teacher: Tensor) -> bool:
    """Whether ``exact_loss`` takes logits of these devices and dtypes. The first call builds the library."""
    alike = student.device.type == teacher.device.type == "cpu" and student.dtype == teacher.dtype
    return alike and student.dtype in FUNCTIONS and _library() is not None


def exact_loss(
    s: Tensor,
    s_bias: Tensor,
    t: Tensor,
    t_bias: Tensor,
    label: Tensor,
    kl_scale: Tensor,
    mlm_scale: Tensor,
    temperature: float,
    mlm: bool,
) -> tuple[Tensor, Tensor]:
    """Computes `kl_loss.exact_kernel` of the logits ``s + s_bias`` and ``t + t_bias``.

    ``s``, ``t``: [N, V]; the biases: [V]. The C++ code adds the biases, in float32, because torch's addmm
    would first write them to all rows of its output. The gradient is written to ``s``. Returns KL [N] and CE
    [N]. The rows are distributed over as many threads as torch uses.
    """
    count, vocab_size = s.shape
    assert all(part.is_contiguous() for part in (s, t, label, kl_scale, mlm_scale))
    assert (t.shape, t.dtype) == (s.shape, s.dtype)
    biases = s_bias.float().contiguous(), t_bias.float().contiguous()
    kl, ce = torch.empty(count), torch.empty(count)
    function = getattr(_library(), FUNCTIONS[s.dtype])

    def work(rows: slice) -> None:
        s_rows = s[rows]
        function(
            s_rows.data_ptr(), biases[0].data_ptr(), t[rows].data_ptr(), biases[1].data_ptr(),
            label[rows].data_ptr(), kl_scale[rows].data_ptr(), mlm_scale[rows].data_ptr(),
            len(s_rows), vocab_size, temperature, mlm, kl[rows].data_ptr(), ce[rows].data_ptr(),
        )  # fmt: skip

    native.in_threads(work, count, torch.get_num_threads())
    return kl, ce


@cache
def _library() -> ctypes.CDLL | None:
    integer, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    arguments = [*[pointer] * 7, integer, integer, number, ctypes.c_int, pointer, pointer]
    slower = "the exact soft target's loss runs by torch.compile or uncompiled, slower"
    return native.load_library(SOURCE, slower, FUNCTIONS.values(), arguments)
