"""KL divergence with temperature, and cross-entropy, over the vocabulary, with their gradients by the logits.

Each kernel takes the student's logits ``s`` [C, V], and overwrites them with the gradient with respect to
``s`` of ``sum(kl_scale * T * KL) + sum(mlm_scale * CE)``. It returns KL [C] and CE [C] in nats. CE is 0 at
positions without a label; their mlm_scale must be 0. If ``mlm`` is False, no CE is computed, and all are 0.
Inputs may be bfloat16 or float16; the arithmetic is float32, or float64 for float64. The kernels are plain
tensor operations, which torch.compile fuses into a few passes over a row in the cache. For exact targets a
CPU usually runs the same formula in C++ (`native_kl`), and a GPU in Triton (`kl_triton`); `triple_loss`
chooses, and puts the weights and T^2 / T into the scales.

KL is the sum of p (log p - log q); in float32 its error is about 2e-7, from rounding both normalisers.

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
    """CE, and KL from the soft target that the teacher's logits ``t`` [C, V] give.

    d(T KL(p || q)) / ds = q - p with q = softmax(s / T), p = softmax(t / T). dCE / ds = softmax(s) - onehot.
    """
    x = _centred(s)
    e_T, e_1 = _exponentials(x, temperature)
    z_T = e_T.sum(1, keepdim=True)
    y = _centred(t) * (1 / temperature)  # y, f, z_f of the teacher are as x / T, e_T, z_T of the student
    f = torch.exp(y)
    z_f = f.sum(1, keepdim=True)
    p, q = f * z_f.reciprocal(), e_T * z_T.reciprocal()
    log_p, log_q = y - z_f.log(), x * (1 / temperature) - z_T.log()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)  # y of tokens that pad V may be -inf
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
    """CE, and KL from a top-k soft target: ``p`` [C, K] of ``ids`` [C, K], and ``p_tail`` [C] of all others.

    With lse = logsumexp(s / T), lse_tail the same over v not in ids only, and log q_tail = lse_tail - lse:

        KL = sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)
           = const - sum_k p_k s_k / T - p_tail lse_tail + lse        (since sum_k p_k + p_tail = 1)
        d(T KL)/ds_k = q_k - p_k; outside the top k: d(T KL)/ds_v = q_v - p_tail q_v / q_tail

    So the target outside the top k is p_tail, spread in the student's own proportions. q_tail is summed over
    its tokens, because 1 - sum_k q_k would suffer cancellation.
    """
    x = _centred(s)
    p, p_tail = p.to(x.dtype), p_tail.to(x.dtype)
    e_T, e_1 = _exponentials(x, temperature)
    log_z = e_T.sum(1).log()
    q = e_T / e_T.sum(1, keepdim=True)
    x_k = x.gather(1, ids)
    # The tail's exponentials are relative to its own maximum: relative to the row's, they could underflow.
    outside = torch.scatter(x, 1, ids, float("-inf"))
    tail_max = outside.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)  # finite if K = V
    e_tail = torch.exp((outside - tail_max) / temperature)
    z_tail = e_tail.sum(1)
    p_tail = torch.where(z_tail > 0, p_tail, 0.0)  # rounding may give p_tail > 0 if K = V
    log_q_k = x_k / temperature - log_z[:, None]
    log_q_tail = tail_max[:, 0] / temperature + z_tail.log() - log_z
    kl = _kl_terms(p, log_q_k).sum(1) + _kl_terms(p_tail, log_q_tail)
    tail_scale = torch.where(p_tail > 0, p_tail / z_tail, 0.0)
    target = torch.scatter(e_tail * tail_scale[:, None], 1, ids, p)
    gradient = kl_scale[:, None] * (q - target)
    ce = torch.zeros_like(kl)
    if mlm:
        ce, gradient_1 = _cross_entropy(x, e_1, label)
        gradient = gradient + mlm_scale[:, None] * gradient_1
    s.copy_(gradient)
    return kl, ce


def mlm_kernel(s: Tensor, label: Tensor, mlm_scale: Tensor) -> tuple[Tensor, Tensor]:
    """CE alone, for a loss without a soft target; the returned KL is 0."""
    x = _centred(s)
    ce, gradient = _cross_entropy(x, torch.exp(x), label)
    s.copy_(mlm_scale[:, None] * gradient)
    return torch.zeros_like(ce), ce


def _centred(logits: Tensor) -> Tensor:
    """Returns the logits less the maximum of their row, in float32 or float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits - logits.amax(1, keepdim=True)


def _exponentials(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns exp(x / T) and exp(x); if T is 1 or 2, only one exponential is computed."""
    e_T = torch.exp(x * (1 / temperature))
    if temperature == 1.0:
        return e_T, e_T
    return e_T, e_T * e_T if temperature == 2.0 else torch.exp(x)


def _cross_entropy(x: Tensor, e: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Returns CE [C] and its gradient [C, V], given centred logits ``x`` [C, V] and ``e`` = exp(x)."""
    z = e.sum(1, keepdim=True)
    at_label = x.gather(1, label.clamp_min(0)[:, None])
    ce = torch.where(label == NO_LABEL, 0.0, (z.log() - at_label)[:, 0])
    column = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
    return ce, e * z.reciprocal() - (column[None, :] == label[:, None].int()).to(x.dtype)


def _kl_terms(p: Tensor, log_q: Tensor) -> Tensor:
    """Returns p (log p - log q), and 0 where p = 0."""
    return torch.where(p > 0, p * (p.clamp_min(torch.finfo(p.dtype).tiny).log() - log_q), 0.0)


MAX_SHAPES = 64
"""Number of shapes for which a kernel may be compiled; torch's default of 8 is too low for chunked losses."""
Kernel = Callable[..., tuple[Tensor, Tensor]]
"""A function that may overwrite its first argument, and returns two tensors; here KL and CE."""


@cache
def fused(kernel: Kernel) -> Kernel:
    """Returns ``kernel`` compiled for fixed shapes; if that fails, it runs uncompiled, with a warning.

    A kernel may overwrite its input, so with a new shape it first runs on copies: a failure leaves the input
    unchanged.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MAX_SHAPES)
    # Torch's cache on disk has one key for AVX2 and AVX-512 kernels, and a kernel of the other kind computes
    # wrong numbers. Nodes of both kinds may share a cache, so the key gets the processor's capability.
    tag, capability = torch.compiler.config.cache_key_tag, torch.backends.cpu.get_cpu_capability()
    if not tag.endswith(capability):
        torch.compiler.config.cache_key_tag = tag + capability
    compiled = torch.compile(kernel, dynamic=False, fullgraph=True)
    works: dict[tuple[object, ...], bool] = {}

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        key = tuple((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments)
        if key not in works:
            works[key] = _try(compiled, arguments, warn=all(works.values()))  # only about the first failure
        return (compiled if works[key] else kernel)(*arguments)

    return run


def _try(compiled: Kernel, arguments: tuple[Any, ...], warn: bool) -> bool:
    """Returns whether the kernel compiles and runs on copies of the arguments. Raises OutOfMemoryError."""
    try:
        compiled(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # errors of the compiler have no common type
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
