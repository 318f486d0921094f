"""The teacher's distributions at N positions, in the two forms that a store can hold.

``ExactTarget`` applies the teacher's masked-LM head to its last hidden states, which gives the full
distribution at any temperature. ``TopkTarget`` has the K largest logits and the logsumexp over the
whole vocabulary at one temperature. All tokens outside the top K form one bucket of known mass.

Axes: N positions, K top-k, V vocabulary, D teacher's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from offline_teacher.models.head import aligned_decoder
from student_train.objectives.vocabulary_kernels import Kernel, exact_kernel, topk_kernel


class Decoder(Protocol):
    """The teacher's frozen masked-LM head: an interface of `offline_teacher.models.replay.Replay`."""

    def decoder_input(self, last_hidden: Tensor) -> Tensor:
        """[n, D] -> [n, D] in the head's dtype."""

    @property
    def decoder_weight(self) -> Tensor:
        """[V, D]"""

    @property
    def decoder_bias(self) -> Tensor:
        """[V]"""


class SoftTarget(Protocol):
    """The teacher's distributions at N positions, for the chunked loss."""

    kernel: ClassVar[Kernel]
    """A function of `vocabulary_kernels`. Its arguments are the student's logits, ``arguments``, and the
    labels."""

    def __len__(self) -> int: ...

    def buffer(self, positions: int) -> Tensor | None:
        """A tensor [positions, V] that ``arguments`` may fill and return; None if the target needs none."""

    def arguments(self, rows: slice, buffer: Tensor | None) -> tuple[Tensor, ...]:
        """The kernel's arguments, each with as many rows as ``rows``; the buffer may have more."""


@dataclass(frozen=True)
class ExactTarget:
    """The teacher's full distribution at any temperature, from its last hidden states."""

    head: Decoder
    hidden: Tensor
    """[N, D], any float dtype; of an int8 store already multiplied by its scale."""
    kernel: ClassVar[Kernel] = staticmethod(exact_kernel)

    def __len__(self) -> int:
        return len(self.hidden)

    def buffer(self, positions: int) -> Tensor:
        return self.head.decoder_weight.new_empty(positions, len(self.head.decoder_weight))

    def arguments(self, rows: slice, buffer: Tensor | None) -> tuple[Tensor, ...]:
        assert buffer is not None
        self.rows(rows, out=buffer[: rows.stop - rows.start])
        return (buffer,)

    def products(self, rows: slice, out: Tensor) -> Tensor:
        """Teacher logits [n, V] of these positions without ``head.decoder_bias``, written to ``out``."""
        return torch.mm(self.head.decoder_input(self.hidden[rows]), self.head.decoder_weight.t(), out=out)

    def rows(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Teacher logits [n, V] of these positions, in the head's dtype, written to ``out`` if given."""
        z = self.head.decoder_input(self.hidden[rows])
        return torch.addmm(self.head.decoder_bias, z, self.head.decoder_weight.t(), out=out)


@dataclass(frozen=True)
class _AlignedHead:
    """A teacher's head whose decoder has the rows that `aligned_decoder` appends."""

    head: Decoder
    decoder_weight: Tensor
    decoder_bias: Tensor

    def decoder_input(self, last_hidden: Tensor) -> Tensor:
        return self.head.decoder_input(last_hidden)


def aligned(target: SoftTarget | None) -> SoftTarget | None:
    """The target whose logits have as many columns as those of an aligned decoder of the student."""
    if not isinstance(target, ExactTarget):
        return target
    head = target.head
    return replace(target, head=_AlignedHead(head, *aligned_decoder(head.decoder_weight, head.decoder_bias)))


@dataclass(frozen=True)
class TopkTarget:
    """The K most likely tokens with their exact probabilities, and the rest as one bucket."""

    topk_ids: Tensor
    """[N, K] integers, distinct within a row."""
    topk_logits: Tensor
    """[N, K] logits at temperature 1 (the store's float16, or wider)."""
    logsumexp: Tensor
    """[N] logsumexp over the whole vocabulary of logits / temperature, float32 or wider."""
    temperature: float
    kernel: ClassVar[Kernel] = staticmethod(topk_kernel)

    def __len__(self) -> int:
        return len(self.topk_ids)

    def buffer(self, positions: int) -> None:
        return None

    def arguments(self, rows: slice, buffer: Tensor | None) -> tuple[Tensor, ...]:
        return self.rows(rows)

    def rows(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """ids int64 [n, K], p [n, K] and tail mass [n], which sum to 1 in every row.

        p_k = exp(logit_k / T - logsumexp_T) needs no renormalisation over the K. With a the log of
        sum_k p_k, the tail is -expm1(a): it cancels only where the K hold nearly all the mass, and
        there its absolute error (about 2^-12 |logit| / T, the rounding of float16 logits) is that
        of the p_k themselves. Rounding can bring a above 0: then the tail is empty and the p_k,
        which sum to exp(a), are scaled back to 1, so that the gradient still sums to zero.
        """
        logsumexp = self.logsumexp[rows]
        log_p = self.topk_logits[rows].to(logsumexp.dtype) / self.temperature - logsumexp[:, None]
        kept = torch.logsumexp(log_p, dim=1)
        p = torch.exp(log_p - kept.clamp_min(0)[:, None])
        return self.topk_ids[rows].long(), p, -torch.expm1(kept.clamp_max(0))
