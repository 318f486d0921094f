"""Fast dropout on a CPU; torch's own dropout draws a random number per element on a single thread.

A C++ kernel draws random numbers and applies dropout in one pass. The backward pass draws the same numbers
again, so no mask is kept in memory. The probability is rounded to a multiple of 2^-16, and the scale factor
matches the rounded value. The seed comes from torch's global generator, so ``torch.manual_seed`` controls it.
Without a C++ compiler, slower tensor operations are used. On other devices and in evaluation, torch's own
dropout is used.

Axes: B batch, H heads, L length, E dimensions per head.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from infra.cpu import native

NAME = "sdpa_cpu_dropout"
"""Name of this attention in transformers' registry."""
SOURCE = Path(__file__).with_suffix(".cpp")
FUNCTIONS = {torch.float32: "dropout_float32", torch.bfloat16: "dropout_bfloat16"}
_LEVELS = 1 << 16
"""Number of values of a 16-bit random number. An element whose number is below a level is dropped."""


def use_fast_dropout(model: PreTrainedModel) -> None:
    """Replaces every dropout of ``model``, and also that in attention if it uses torch's fused attention. The
    saved files of the model do not change."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, FastDropout(module.p))
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def apply_dropout(x: Tensor, p: float) -> Tensor:
    """Returns ``x`` with each element set to 0 with probability ``p``, and scaled otherwise."""
    if x.dtype in FUNCTIONS and _library() is not None:
        return _NativeDropout.apply(x, p)
    keep, scale = draw_keep_mask(x.shape, p)
    return torch.where(keep, x * scale, 0.0)


def draw_keep_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """Returns bool of ``shape``, false with probability ``p``, and the factor that keeps the mean."""
    level, scale = _level_and_scale(p)
    draws = torch.empty(-(-math.prod(shape) // 4), dtype=torch.int64).random_(-(1 << 63), None)
    levels = draws.view(torch.int16)[: math.prod(shape)].view(shape)
    return levels >= level - _LEVELS // 2, scale


def _level_and_scale(p: float) -> tuple[int, float]:
    """Returns 2^16 times the rounded probability, and the factor that keeps the mean."""
    level = min(round(p * _LEVELS), _LEVELS - 1)
    return level, _LEVELS / (_LEVELS - level)


class _NativeDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.p, ctx.seed = p, int(torch.randint(1 << 62, ()))
        return _run_native(x, p, ctx.seed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _run_native(gradient, ctx.p, ctx.seed), None


def _run_native(x: Tensor, p: float, seed: int) -> Tensor:
    """Applies the C++ kernel; equal seeds drop the elements at equal positions."""
    x = x.contiguous()
    y = torch.empty_like(x)
    level, scale = _level_and_scale(p)
    library = _library()
    assert library is not None
    function, block = getattr(library, FUNCTIONS[x.dtype]), library.dropout_block()

    def run(blocks: slice) -> None:
        end = min(x.numel(), blocks.stop * block)
        function(x.data_ptr(), y.data_ptr(), blocks.start, end, seed, level, scale)

    native.in_threads(run, -(-x.numel() // block), torch.get_num_threads())
    return y


@cache
def _library() -> ctypes.CDLL | None:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    arguments = [pointer, pointer, integer, integer, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float]
    library = native.load_library(SOURCE, "dropout runs uncompiled, slower", FUNCTIONS.values(), arguments)
    if library is not None:
        library.dropout_block.restype = integer
    return library


class FastDropout(nn.Dropout):
    """``nn.Dropout`` that uses the fast implementation on a CPU in training."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p or input.device.type != "cpu":
            return super().forward(input)
        return apply_dropout(input, self.p)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Returns [B, L, H, E] for query, key and value [B, H, L, E] and a bool mask, true at visible positions.
    Torch's fused attention has no dropout on a CPU: torch then runs the operations below and more."""
    if not dropout or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    scores = torch.matmul(query * (scaling or query.shape[-1] ** -0.5), key.transpose(2, 3))
    if attention_mask is not None:
        assert attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = apply_dropout(torch.softmax(scores, dim=-1), dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
