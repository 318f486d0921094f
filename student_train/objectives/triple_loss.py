"""The triple loss of DistilBERT (arXiv 1910.01108) without a [N, V] tensor.

    loss = alpha_ce T^2 sum KL(p_T || q_T) / kl_tokens + alpha_mlm sum CE / masked
         + alpha_cos sum (1 - cos) / tokens

The caller gives the denominators kl_tokens, masked and tokens: counts over the whole optimiser step, that is,
over ranks and micro-batches. So the loss of a step is the sum of its micro-batch losses. One autograd
function computes the student's logits, the soft target, KL, CE and their gradients chunk by chunk.

Axes: N positions of a micro-batch without padding, V vocabulary, D student's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infra.cpu.native import has_triton
from offline_teacher.models.head import aligned_decoder
from student_train.objectives import native_kl
from student_train.objectives.kl_loss import NO_LABEL, Kernel, exact_kernel, fused, mlm_kernel
from student_train.objectives.soft_targets import ExactTarget, SoftTarget, aligned

CHUNK_SIZE = {"cpu": 2048, "cuda": 4096}
"""Number of positions in a chunk of the matrix products, for numbers of two bytes; wider numbers get fewer
positions, so that a chunk's buffers keep their size. Small chunks make the products slow, and every chunk
adds a pass over the decoder's gradient. Large chunks only cost memory."""
TRANSPOSED_TOKENS = {"cpu": 1024}
"""Tokens whose decoder gradient is transposed at once; on a CPU it fits the cache."""
BIAS_ROWS = 8
"""Rows added below the transposed z, so that one product gives the gradients of weight and bias: one row of
ones, and zeros, because tensor cores are faster with multiples of 8."""
BLOCK_SIZE = {"cpu": 64, "cuda": 1024}
"""Positions in a block, that is, in one call of a compiled kernel. On a CPU a block fits the cache. On a GPU
blocks are small enough that a chunk's last one, which is filled up with rows of weight 0, wastes little."""


@dataclass(frozen=True)
class LossTerms:
    """The terms of a micro-batch's loss: float32 scalars, each a sum divided by the caller's denominator.
    ``total`` is their weighted sum, the only scalar with a gradient. ``kl`` lacks the factor T^2."""

    total: Tensor
    kl: Tensor
    mlm: Tensor
    cosine: Tensor
    relation: Tensor
    embedding: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> LossTerms:
        return cls(*[torch.zeros((), device=device)] * 6)

    def values(self) -> tuple[Tensor, ...]:
        """Returns all terms in the order of `objective.TERMS`."""
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
    """Returns the terms of one micro-batch. A term whose weight or denominator is 0 is 0 and is not computed.

    Args:
        z: [N, D], inputs of the student's decoder at the positions of KL and CE. Matrix products have the
            dtype of z (bfloat16, float16, float32, float64); sums are float32, or float64 for float64.
        decoder_weight, decoder_bias: [V, D], [V]; None only if alpha_ce and alpha_mlm are 0.
        target: the teacher's distributions at the N positions; None only if alpha_ce is 0.
        labels: int64 [N], original ids at masked positions, -100 elsewhere.
        student_hidden: [N', D'], at the positions of the cosine term.
        teacher_hidden: [N', D']; None only if alpha_cos is 0.
        tokens, masked, kl_tokens: denominators of cosine, CE and KL.
        chunk_size: positions per chunk; None: from ``CHUNK_SIZE`` of the device.
        compile: use the C++ kernel, the Triton kernel or torch.compile; otherwise plain tensor operations.
    """
    zero = torch.zeros((), device=z.device, dtype=_sum_dtype(z))
    total = kl = mlm = cosine = zero
    kl_weight = alpha_ce * temperature**2 / kl_tokens if alpha_ce and kl_tokens else 0.0
    mlm_weight = alpha_mlm / masked if alpha_mlm and masked else 0.0
    inputs = _Inputs(
        target=target if kl_weight else None,
        labels=labels,
        temperature=float(temperature),
        kl_weight=kl_weight,
        mlm_weight=mlm_weight,
        chunk_size=chunk_size or CHUNK_SIZE.get(z.device.type, 1024) * 2 // z.element_size(),
        compile=compile,
        gradients=torch.is_grad_enabled(),
    )
    if kl_weight or mlm_weight:
        assert decoder_weight is not None, "KL and CE need the decoder"
        assert target is not None or not kl_weight, "KL needs a soft target"
        total, kl, mlm = VocabularyLoss.apply(z, decoder_weight, decoder_bias, inputs)
        kl = kl / kl_tokens if kl_weight else zero
        mlm = mlm / masked if mlm_weight else zero
    if alpha_cos and tokens:
        assert teacher_hidden is not None, "a cosine term needs the teacher's hidden states"
        distance = cosine_distance(student_hidden, teacher_hidden)
        total = total + alpha_cos / tokens * distance
        cosine = distance.detach() / tokens
    return LossTerms(total, kl, mlm, cosine, zero, zero)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the sum of 1 - cos(student, teacher) over the rows of [N', D']."""
    dtype = _sum_dtype(student)
    return (1 - functional.cosine_similarity(student.to(dtype), teacher.to(dtype), dim=1)).sum()


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Inputs:
    """Inputs of the vocabulary terms without a gradient; weights include alpha, T^2 and denominator."""

    target: SoftTarget | None
    labels: Tensor
    temperature: float
    kl_weight: float
    mlm_weight: float
    chunk_size: int
    compile: bool
    gradients: bool


class VocabularyLoss(torch.autograd.Function):
    """Returns (kl_weight sum KL + mlm_weight sum CE, sum KL, sum CE), given z [N, D] and the decoder.

    ``forward`` also computes the gradients; ``backward`` only scales them. Until then they are divided by the
    larger weight, because the large denominators of a step would make float16 gradients underflow.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, inputs: _Inputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            scale = max(inputs.kl_weight / inputs.temperature, inputs.mlm_weight)
            chunks = _Chunks(z, *aligned_decoder(weight.to(z.dtype), bias.to(z.dtype)), inputs, scale)
            for start in range(0, len(z), inputs.chunk_size):
                chunks.compute(start, min(start + inputs.chunk_size, len(z)))
        kl, ce = chunks.values[:, : len(z)].sum(1, dtype=torch.float64).unbind()
        total = inputs.kl_weight * kl + inputs.mlm_weight * ce
        ctx.scale, ctx.dtypes = scale, (z.dtype, weight.dtype, bias.dtype)
        ctx.dz, ctx.ddecoder = chunks.dz, chunks.ddecoder
        if ctx.ddecoder is None:  # N = 0
            ctx.ddecoder = z.new_zeros(z.shape[1] + BIAS_ROWS, len(weight))
        ctx.ddecoder = ctx.ddecoder[:, : len(weight)]
        total, kl, ce = (value.to(chunks.sum_dtype) for value in (total, kl, ce))
        ctx.mark_non_differentiable(kl, ce)
        return total, kl, ce

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scale, width, (z, weight, bias) = grad_total * ctx.scale, ctx.dz.shape[1], ctx.dtypes
        dz = torch.mul(ctx.dz, scale, out=torch.empty_like(ctx.dz, dtype=z))
        dbias = torch.mul(ctx.ddecoder[width], scale, out=torch.empty_like(ctx.ddecoder[width], dtype=bias))
        return dz, _transposed(ctx.ddecoder[:width], scale, weight), dbias, None


def _transposed(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``scale`` times the transposed gradient: [D, V] -> [V, D]."""
    out = gradient.new_empty(gradient.shape[1], gradient.shape[0], dtype=dtype)
    size = TRANSPOSED_TOKENS.get(gradient.device.type, len(out))
    for rows, columns in zip(out.split(size), gradient.split(size, dim=1), strict=True):
        torch.mul(columns.t().contiguous(), scale, out=rows)
    return out


class _Chunks:
    """Computes KL, CE and gradients, divided by ``scale``, chunk by chunk; owns the buffers [chunk, V]."""

    def __init__(self, z: Tensor, weight: Tensor, bias: Tensor, inputs: _Inputs, scale: float) -> None:
        self.z, self.weight, self.bias, self.inputs = z, weight, bias, inputs
        self.target = aligned(inputs.target)
        self.sum_dtype = _sum_dtype(z)
        self.block = min(inputs.chunk_size, BLOCK_SIZE.get(z.device.type, inputs.chunk_size))
        mlm_scale = (inputs.labels != NO_LABEL).to(self.sum_dtype) * (inputs.mlm_weight / scale)
        kl_scale = torch.full_like(mlm_scale, inputs.kl_weight / inputs.temperature / scale)
        self.kl_scale, self.mlm_scale = self._padded(kl_scale), self._padded(mlm_scale)
        self.labels = self._padded(inputs.labels, NO_LABEL)
        self.values = z.new_zeros(2, len(self.labels), dtype=self.sum_dtype)  # KL and CE of every position
        self.logits = z.new_empty(-(-inputs.chunk_size // self.block) * self.block, len(weight))
        self.buffer = None if self.target is None else self.target.buffer(len(self.logits))
        self.dz = torch.empty_like(z)
        self.ddecoder: Tensor | None = None
        """Gradient [D + BIAS_ROWS, V] of the decoder: transposed weight, bias, zeros."""

    def compute(self, start: int, stop: int) -> None:
        """Computes values and gradients of the positions [start, stop), one chunk."""
        rows = slice(start, stop)
        z, s, target = self.z[rows], self.logits[: stop - start], self.target if self.inputs.compile else None
        if isinstance(target, ExactTarget) and native_kl.usable(z, target.head.decoder_weight):
            self._run_native(target, start, stop)
        else:
            torch.addmm(self.bias, z, self.weight.t(), out=s)
            self._run_blocks(start, stop)
        if self.inputs.gradients:
            torch.mm(s, self.weight, out=self.dz[rows])
            self._add_to_decoder(z, s)

    def _add_to_decoder(self, z: Tensor, s: Tensor) -> None:
        """Adds a chunk to ``ddecoder``: inputs ``z`` [n, D] and gradients ``s`` [n, V] of the logits.

        On a CPU, [D, n] x [n, V] takes half the time of [V, n] x [n, D], which transposes the larger matrix.
        """
        ones = z.new_zeros(BIAS_ROWS, len(z))
        ones[0] = 1
        product = torch.mm(torch.cat([z.t(), ones]), s)
        before = self.ddecoder
        self.ddecoder = product if before is None else before.to(self.sum_dtype).add_(product)

    def _run_native(self, target: ExactTarget, start: int, stop: int) -> None:
        """Computes the chunk's logits and turns them into gradients, by the C++ kernel."""
        assert self.buffer is not None
        at, s, t = slice(start, stop), self.logits[: stop - start], self.buffer[: stop - start]
        torch.mm(self.z[at], self.weight.t(), out=s)
        target.logits_without_bias(at, out=t)
        row_inputs = self.labels[at], self.kl_scale[at], self.mlm_scale[at]
        options = self.inputs.temperature, self.inputs.mlm_weight > 0
        kl, ce = native_kl.exact_loss(s, self.bias, t, target.head.decoder_bias, *row_inputs, *options)
        self.values[0, at] = kl * (self.kl_scale[at] > 0)
        self.values[1, at] = ce

    def _run_blocks(self, start: int, stop: int) -> None:
        """Turns the chunk's logits into gradients, block by block. All blocks have the same number of rows,
        so that a kernel compiles once; rows beyond ``stop`` have weight 0."""
        target = self.target
        soft: tuple[Tensor, ...] = ()
        if target is not None:
            arguments = target.arguments(slice(start, stop), self.buffer)
            # the buffer has rows for full blocks already
            soft = tuple(part if part is self.buffer else self._padded(part) for part in arguments)
        for offset in range(0, stop - start, self.block):
            in_chunk = slice(offset, offset + self.block)
            at = slice(start + offset, start + offset + self.block)  # in the micro-batch
            s, label = self.logits[in_chunk], self.labels[at]
            kl_scale, mlm_scale = self.kl_scale[at], self.mlm_scale[at]
            if target is None:
                kl, ce = self._run(mlm_kernel, s, label, mlm_scale)
            else:
                options = self.inputs.temperature, self.inputs.mlm_weight > 0
                parts = (part[in_chunk] for part in soft)
                kl, ce = self._run(target.kernel, s, *parts, label, kl_scale, mlm_scale, *options)
            self.values[0, at] = kl * (kl_scale > 0)
            self.values[1, at] = ce

    def _run(self, kernel: Kernel, *arguments: Any) -> tuple[Tensor, Tensor]:
        if not self.inputs.compile:
            return kernel(*arguments)
        return (_triton_kernel(kernel, arguments[0]) or fused(kernel))(*arguments)

    def _padded(self, rows: Tensor, value: float = 0) -> Tensor:
        """Returns ``rows`` [n, ...] with a block of ``value`` appended, so that every block is full."""
        return torch.cat([rows, rows.new_full((self.block, *rows.shape[1:]), value)])


def _triton_kernel(kernel: Kernel, logits: Tensor) -> Kernel | None:
    """Returns the kernel in Triton; None if there is none for these logits."""
    if kernel is not exact_kernel or logits.device.type != "cuda" or not has_triton():
        return None
    from student_train.objectives import kl_triton

    return kl_triton.exact_kernel if logits.dtype in kl_triton.DTYPES else None
