"""Row-wise arithmetic over the vocabulary: loss values and gradients of a chunk of logits.

Each kernel takes student logits ``s`` [C, V], overwrites them with the gradient of
``sum(kl_scale * T * KL) + sum(mlm_scale * CE)`` with respect to them, and returns KL [C] and CE [C]
(CE is 0 where there is no label). Inputs may be bfloat16 or float16; everything inside is float32
(float64 for float64). Written as plain tensor arithmetic so that torch.compile fuses each kernel into a few
passes over a row that stays in cache; uncompiled they are the same functions.

KL is summed as p (log p - log q); in float32 that is good to about 2e-7, the rounding of the two normalisers.

Axes: C positions of a chunk, V vocabulary, K top-k.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from student_train.data.collate import NO_LABEL


def exact_kernel(
    s: Tensor, t: Tensor, label: Tensor, kl_scale: Tensor, mlm_scale: Tensor, temperature: float, mlm: bool
) -> tuple[Tensor, Tensor]:
    """Soft target given as teacher logits ``t`` [C, V].

    d(T KL(p || q)) / ds = q - p, with q = softmax(s / T), p = softmax(t / T); dCE/ds = q_1 - onehot.
    """
    x = _centred(s)
    e_T, e_1 = _exponentials(x, temperature)
    z_T = e_T.sum(1, keepdim=True)
    y = _centred(t) * (1 / temperature)
    f = torch.exp(y)
    z_f = f.sum(1, keepdim=True)
    p, q = f * z_f.reciprocal(), e_T * z_T.reciprocal()
    log_p, log_q = y - z_f.log(), x * (1 / temperature) - z_T.log()
    kl = (p * (log_p - log_q)).sum(1)
    gradient = kl_scale[:, None] * (q - p)
    ce = torch.zeros_like(kl)
    if mlm:
        ce, gradient_1 = _cross_entropy(x, e_1, label)
        gradient = gradient + mlm_scale[:, None] * gradient_1
    s.copy_(gradient)
    return kl, ce


def topk_kernel(
    s: Tensor,
    ids: Tensor,
    p: Tensor,
    p_tail: Tensor,
    label: Tensor,
    kl_scale: Tensor,
    mlm_scale: Tensor,
    temperature: float,
    mlm: bool,
) -> tuple[Tensor, Tensor]:
    """Soft target given as ``p`` [C, K] of tokens ``ids`` [C, K] and one bucket ``p_tail`` [C] for the rest.

    With lse = logsumexp(s / T), tail = logsumexp over v not in ids of s_v / T, log q_tail = tail - lse:

        KL = sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)
           = const - sum_k p_k s_k / T - p_tail tail + lse        (since sum_k p_k + p_tail = 1)
        d(T KL)/ds_k = q_k - p_k,      d(T KL)/ds_v = q_v - p_tail q_v / q_tail   outside the top k:

    the student is pulled towards the teacher's tail mass spread in the student's own proportions.
    ``tail`` is a sum over the tail itself, never 1 minus the rest.
    """
    x = _centred(s)
    p, p_tail = p.to(x.dtype), p_tail.to(x.dtype)
    e_T, e_1 = _exponentials(x, temperature)
    log_z = e_T.sum(1).log()
    q = e_T / e_T.sum(1, keepdim=True)
    x_k = x.gather(1, ids)
    # The tail has its own maximum, so that a tail far below the top k does not underflow.
    outside = torch.scatter(x, 1, ids, float("-inf"))
    top = outside.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)
    tail = torch.exp((outside - top) / temperature)
    z_tail = tail.sum(1)
    p_tail = torch.where(z_tail > 0, p_tail, 0.0)  # rounding may leave some where the top k is all of V
    log_q_k = x_k / temperature - log_z[:, None]
    log_q_tail = top[:, 0] / temperature + z_tail.log() - log_z
    kl = _divergence(p, log_q_k).sum(1) + _divergence(p_tail, log_q_tail)
    pull = torch.where(p_tail > 0, p_tail / z_tail, 0.0)
    target = torch.scatter(tail * pull[:, None], 1, ids, p)
    gradient = kl_scale[:, None] * (q - target)
    ce = torch.zeros_like(kl)
    if mlm:
        ce, gradient_1 = _cross_entropy(x, e_1, label)
        gradient = gradient + mlm_scale[:, None] * gradient_1
    s.copy_(gradient)
    return kl, ce


def mlm_kernel(s: Tensor, label: Tensor, mlm_scale: Tensor) -> tuple[Tensor, Tensor]:
    """No soft target: KL is 0."""
    x = _centred(s)
    ce, gradient = _cross_entropy(x, torch.exp(x), label)
    s.copy_(mlm_scale[:, None] * gradient)
    return torch.zeros_like(ce), ce


def _centred(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide - wide.amax(1, keepdim=True)


def _exponentials(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """exp(x / T) and exp(x), by one exponential where T is 1 or 2."""
    e_T = torch.exp(x * (1 / temperature))
    if temperature == 1.0:
        return e_T, e_T
    return e_T, e_T * e_T if temperature == 2.0 else torch.exp(x)


def _cross_entropy(x: Tensor, e: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """CE [C] and its gradient [C, V], of centred logits ``x`` and ``e`` = exp(x)."""
    z = e.sum(1, keepdim=True)
    at_label = x.gather(1, label.clamp_min(0)[:, None])
    ce = torch.where(label == NO_LABEL, 0.0, (z.log() - at_label)[:, 0])
    column = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
    return ce, e * z.reciprocal() - (column[None, :] == label[:, None].int()).to(x.dtype)


def _divergence(p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), which is 0 where p = 0."""
    return torch.where(p > 0, p * (p.clamp_min(torch.finfo(p.dtype).tiny).log() - log_q), 0.0)


MOST_SHAPES = 64
"""Number of shapes for which a kernel may be compiled; torch's default of 8 is too low for chunked losses."""
Kernel = Callable[..., tuple[Tensor, Tensor]]


@cache
def fused(kernel: Kernel) -> Kernel:
    """``kernel`` compiled for fixed shapes; the kernel itself, with one warning, where that fails.

    A kernel overwrites its input, so it is compiled and first run on copies: after a failure the input is
    still valid. An error in a kernel that has run once is raised.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MOST_SHAPES)
    # Torch's cache on disk does not tell kernels for AVX2 from those for AVX-512. Exchanged, they compute
    # wrong numbers, for example where nodes of two kinds share the cache.
    tag, capability = torch.compiler.config.cache_key_tag, torch.backends.cpu.get_cpu_capability()
    if not tag.endswith(capability):
        torch.compiler.config.cache_key_tag = tag + capability
    compiled = torch.compile(kernel, dynamic=False, fullgraph=True)
    tried: dict[tuple[object, ...], bool] = {}

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        key = tuple((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments)
        if key not in tried:
            tried[key] = _works(compiled, arguments, warn=all(tried.values()))
        return (compiled if tried[key] else kernel)(*arguments)

    return run


def _works(compiled: Kernel, arguments: tuple[Any, ...], warn: bool) -> bool:
    try:
        compiled(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's failures have no common type
        if warn:
            reason = "".join(str(error).strip().splitlines()[:1])
            warnings.warn(
                f"the loss runs uncompiled, slower: torch.compile failed with {type(error).__name__}: "
                f"{reason} (a C++ compiler is needed on CPU, Triton on GPU)",
                RuntimeWarning,
                stacklevel=3,
            )
        return False
    return True
