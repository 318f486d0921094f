"""The triple loss of DistilBERT (arXiv 1910.01108) without a [N, V] tensor.

    loss = alpha_ce T^2 sum KL(p_T || q_T) / kl_tokens + alpha_mlm sum CE / masked
         + alpha_cos sum (1 - cos) / tokens

The caller gives the denominators: the counts of the whole optimiser step, over ranks and accumulation steps.
So the loss of a step is the sum of its micro-batch losses. One autograd function computes the student's
decoder, the soft target, KL and CE chunk by chunk, and returns the gradients with the values.

Axes: N positions of a micro-batch (non-pad), V vocabulary, D student's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infra.cpu.native import has_triton
from offline_teacher.models.head import aligned_decoder
from student_train.objectives import native_exact
from student_train.objectives.soft_targets import ExactTarget, SoftTarget, aligned
from student_train.objectives.vocabulary_kernels import NO_LABEL, Kernel, exact_kernel, fused, mlm_kernel

CHUNK_SIZE = {"cpu": 2048, "cuda": 4096}
"""Positions in a chunk of the matrix products. Smaller chunks make the products slow, and each further chunk
adds its gradient to the decoder's. Larger chunks only cost memory."""
TURN = {"cpu": 1024}
"""Tokens of the decoder's gradient that are transposed at once: on a CPU they stay in the cache."""
BIAS_ROWS = 8
"""Rows added below the transposed z [N, D], so that one product gives the gradients of weight and bias: one
row of ones, and seven of zeros, because tensor cores are faster with multiples of 8."""
KERNEL_SIZE = {"cpu": 64, "cuda": 4096}
"""Positions in one call of a compiled kernel. On a CPU they are few, so that its passes over V read from the
cache. The native kernel always works row by row."""


@dataclass(frozen=True)
class LossTerms:
    """Float32 scalars. Each term is a sum over this micro-batch divided by the caller's denominator."""

    total: Tensor
    """The weighted loss, the only one with a gradient."""
    kl: Tensor
    """KL(p_T || q_T), without alpha_ce and T^2."""
    mlm: Tensor
    cosine: Tensor
    relation: Tensor
    embedding: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> LossTerms:
        """Zeros, for a loss without terms over single positions."""
        return cls(*[torch.zeros((), device=device)] * 6)

    def values(self) -> tuple[Tensor, ...]:
        """All of them, in the order of `objective.TERMS`."""
        return self.total, self.kl, self.mlm, self.cosine, self.relation, self.embedding


def triple_loss(
    z: Tensor,
    decoder_weight: Tensor | None,
    decoder_bias: Tensor | None,
    target: SoftTarget | None,
    labels: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    *,
    temperature: float,
    alpha_ce: float,
    alpha_mlm: float,
    alpha_cos: float,
    tokens: float,
    masked: float,
    kl_tokens: float,
    chunk_size: int | None = None,
    compile: bool = True,
) -> LossTerms:
    """The loss of one micro-batch; a term whose weight or denominator is 0 is 0 and costs nothing.

    Args:
        z: [N, D] output of the student's MLM head transform at the positions of KL and CE. The matrix
        products
            have its dtype (bfloat16, float16, float32, float64), reductions float32 (float64 for float64).
        decoder_weight, decoder_bias: [V, D], [V]; None only if no term needs the vocabulary.
        target: of the N positions; None only where alpha_ce is 0.
        labels: int64 [N] original ids of masked positions, -100 elsewhere.
        student_hidden, teacher_hidden: [N', D'] at the cosine's positions; the latter None if alpha_cos is 0.
        tokens, masked, kl_tokens: global denominators of cosine, CE and KL.
        chunk_size: positions a chunk; None: ``CHUNK_SIZE`` of the device.
        compile: by the native kernel or torch.compile, not as plain tensor arithmetic.
    """
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    zero = torch.zeros((), device=z.device, dtype=wide)
    total = kl = mlm = cosine = zero
    work = _Work(
        target=target,
        labels=labels,
        temperature=float(temperature),
        kl_weight=alpha_ce * temperature**2 / kl_tokens if alpha_ce and kl_tokens else 0.0,
        mlm_weight=alpha_mlm / masked if alpha_mlm and masked else 0.0,
        chunk_size=chunk_size or CHUNK_SIZE.get(z.device.type, 1024),
        compile=compile,
        gradients=torch.is_grad_enabled(),
    )
    if work.kl_weight or work.mlm_weight:
        total, kl, mlm = _vocabulary_terms(z, decoder_weight, decoder_bias, work)
        kl = kl / kl_tokens if work.kl_weight else zero
        mlm = mlm / masked if work.mlm_weight else zero
    if alpha_cos and tokens:
        assert teacher_hidden is not None, "a cosine term needs the teacher's hidden states"
        distance = cosine_distance(student_hidden, teacher_hidden)
        total = total + alpha_cos / tokens * distance
        cosine = distance.detach() / tokens
    return LossTerms(total, kl, mlm, cosine, zero, zero)


def _vocabulary_terms(
    z: Tensor, decoder_weight: Tensor | None, decoder_bias: Tensor | None, work: _Work
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss, sum KL and sum CE."""
    assert decoder_weight is not None, "KL and CE need the decoder"
    assert work.target is not None or not work.kl_weight, "KL needs a soft target"
    work = work if work.kl_weight else replace(work, target=None)
    terms: tuple[Tensor, Tensor, Tensor] = VocabularyLoss.apply(z, decoder_weight, decoder_bias, work)
    return terms


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over N of 1 - cos(student, teacher) of [N, D'], in float32: CosineEmbeddingLoss, target 1."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    return (1 - functional.cosine_similarity(student.to(wide), teacher.to(wide), dim=1)).sum()


@dataclass(frozen=True)
class _Work:
    """What the vocabulary terms are computed from, apart from the differentiable inputs."""

    target: SoftTarget | None
    labels: Tensor
    temperature: float
    kl_weight: float
    mlm_weight: float
    chunk_size: int
    compile: bool
    gradients: bool


class VocabularyLoss(torch.autograd.Function):
    """(kl_weight sum KL + mlm_weight sum CE, sum KL, sum CE) of z [N, D], decoder weight [V, D], bias [V].

    Forward also computes the gradients; backward only scales them. They are kept relative to the larger of
    the two weights, so that float16 does not underflow with the large denominators of a step.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, work: _Work
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            scale = max(work.kl_weight / work.temperature, work.mlm_weight)
            pass_ = _ChunkedPass(z, *aligned_decoder(weight.to(z.dtype), bias.to(z.dtype)), work, scale)
            for start in range(0, len(z), work.chunk_size):
                pass_.chunk(start, min(start + work.chunk_size, len(z)))
        kl, ce = pass_.values[:, : len(z)].sum(1, dtype=torch.float64).unbind()
        total = work.kl_weight * kl + work.mlm_weight * ce
        ctx.scale, ctx.dtypes = scale, (z.dtype, weight.dtype, bias.dtype)
        ctx.dz, ctx.decoder = pass_.dz, pass_.decoder
        if ctx.decoder is None:  # no positions
            ctx.decoder = z.new_zeros(z.shape[1] + BIAS_ROWS, len(weight))
        ctx.decoder = ctx.decoder[:, : len(weight)]
        total, kl, ce = total.to(pass_.wide), kl.to(pass_.wide), ce.to(pass_.wide)
        ctx.mark_non_differentiable(kl, ce)
        return total, kl, ce

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scale, width, (z, weight, bias) = grad_total * ctx.scale, ctx.dz.shape[1], ctx.dtypes
        dz = torch.mul(ctx.dz, scale, out=torch.empty_like(ctx.dz, dtype=z))
        dbias = torch.mul(ctx.decoder[width], scale, out=torch.empty_like(ctx.decoder[width], dtype=bias))
        return dz, _turned(ctx.decoder[:width], scale, weight), dbias, None


def _turned(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient [D, V] -> scale * gradient [V, D]."""
    out = gradient.new_empty(gradient.shape[1], gradient.shape[0], dtype=dtype)
    some = TURN.get(gradient.device.type, len(out))
    for rows, columns in zip(out.split(some), gradient.split(some, dim=1), strict=True):
        torch.mul(columns.t().contiguous(), scale, out=rows)
    return out


class _ChunkedPass:
    """One pass over the positions of a micro-batch; owns the [C, V] buffers."""

    def __init__(self, z: Tensor, weight: Tensor, bias: Tensor, work: _Work, scale: float) -> None:
        self.z, self.weight, self.bias, self.work = z, weight, bias, work
        self.target = aligned(work.target)
        self.wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        self.block = min(work.chunk_size, KERNEL_SIZE.get(z.device.type, work.chunk_size))
        mlm_scale = (work.labels != NO_LABEL).to(self.wide) * (work.mlm_weight / scale)
        kl_scale = torch.full_like(mlm_scale, work.kl_weight / work.temperature / scale)
        self.kl_scale = self._padded(kl_scale)
        self.mlm_scale = self._padded(mlm_scale)
        self.labels = self._padded(work.labels, NO_LABEL)
        self.values = z.new_zeros(2, len(self.labels), dtype=self.wide)  # KL and CE of every position
        shape = (-(-work.chunk_size // self.block) * self.block, len(weight))
        self.logits = z.new_empty(shape)
        self.buffer = None if self.target is None else self.target.buffer(len(self.logits))
        self.dz = torch.empty_like(z)
        self.decoder: Tensor | None = None

    def chunk(self, start: int, stop: int) -> None:
        """Values and gradients of positions [start, stop)."""
        rows = slice(start, stop)
        z, s, target = self.z[rows], self.logits[: stop - start], self.target
        if (
            self.work.compile
            and isinstance(target, ExactTarget)
            and native_exact.usable(z, target.head.decoder_weight)
        ):
            self._native(target, start, stop)
        else:
            torch.addmm(self.bias, z, self.weight.t(), out=s)
            self._kernels(start, stop)
        if self.work.gradients:
            torch.mm(s, self.weight, out=self.dz[rows])
            self._add_to_decoder(z, s)

    def _add_to_decoder(self, z: Tensor, s: Tensor) -> None:
        """``decoder`` [D + 8, V]: gradients of weight, transposed, and of bias. Of a single chunk as the
        matrix product gave it, of several their sum in ``wide``. A CPU takes half as long over
        [D, N] x [N, V] as over [V, N] x [N, D], where the larger matrix is the transposed one."""
        ones = z.new_zeros(BIAS_ROWS, len(z))
        ones[0] = 1
        product = torch.mm(torch.cat([z.t(), ones]), s)
        self.decoder = product if self.decoder is None else self.decoder.to(self.wide).add_(product)

    def _native(self, target: ExactTarget, start: int, stop: int) -> None:
        """The chunk's logits and their gradients by the kernel in C++, which takes any number of rows."""
        assert self.buffer is not None
        at, s, t = slice(start, stop), self.logits[: stop - start], self.buffer[: stop - start]
        torch.mm(self.z[at], self.weight.t(), out=s)
        target.products(at, out=t)
        scales = self.kl_scale[at], self.mlm_scale[at]
        options = self.work.temperature, self.work.mlm_weight > 0
        kl, ce = native_exact.exact_loss(
            s, self.bias, t, target.head.decoder_bias, self.labels[at], *scales, *options
        )
        self.values[0, at] = kl * (scales[0] > 0)
        self.values[1, at] = ce

    def _kernels(self, start: int, stop: int) -> None:
        """Turns the chunk's logits into gradients, block by block; all blocks have one shape, so kernels
        compile once, and rows beyond ``stop`` have weight 0."""
        target = self.target
        soft: tuple[Tensor, ...] = ()
        if target is not None:
            soft = tuple(self._whole(part) for part in target.arguments(slice(start, stop), self.buffer))
        for offset in range(0, stop - start, self.block):
            here = slice(offset, offset + self.block)  # in the chunk
            at = slice(start + offset, start + offset + self.block)  # in the micro-batch
            s, label = self.logits[here], self.labels[at]
            kl_scale, mlm_scale = self.kl_scale[at], self.mlm_scale[at]
            if target is None:
                kl, ce = self._run(mlm_kernel, s, label, mlm_scale)
            else:
                options = self.work.temperature, self.work.mlm_weight > 0
                parts = (part[here] for part in soft)
                kl, ce = self._run(target.kernel, s, *parts, label, kl_scale, mlm_scale, *options)
            self.values[0, at] = kl * (kl_scale > 0)
            self.values[1, at] = ce

    def _whole(self, part: Tensor) -> Tensor:
        """A kernel's argument with as many rows as whole blocks have; the buffer has them already."""
        return part if part is self.buffer else self._padded(part)

    def _run(self, kernel: Kernel, *arguments: Any) -> tuple[Tensor, Tensor]:
        if not self.work.compile:
            return kernel(*arguments)
        return (_triton_kernel(kernel, arguments[0]) or fused(kernel))(*arguments)

    def _padded(self, rows: Tensor, value: float = 0) -> Tensor:
        """[n, ...] with a block of rows of ``value`` appended, so that the last block can be cut whole."""
        return torch.cat([rows, rows.new_full((self.block, *rows.shape[1:]), value)])


def _triton_kernel(kernel: Kernel, logits: Tensor) -> Kernel | None:
    """The same kernel in Triton, where there is one for these logits."""
    if kernel is not exact_kernel or logits.device.type != "cuda" or not has_triton():
        return None
    from student_train.objectives import vocabulary_triton

    return vocabulary_triton.exact_kernel if logits.dtype in vocabulary_triton.DTYPES else None
