"""The teacher's distributions at N positions: soft targets in the two forms that a store can hold.

`ExactTarget` applies the teacher's masked-LM head to its last hidden states, which gives the full
distribution at any temperature. `TopkTarget` has the K largest logits, and the logsumexp over the whole
vocabulary at one temperature; all other tokens together are one bucket, the *tail*, of known probability.

Axes: N positions, K top-k, V vocabulary, D teacher's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from offline_teacher.models.head import aligned_decoder
from student_train.objectives.kl_loss import Kernel, exact_kernel, topk_kernel


class Decoder(Protocol):
    """The teacher's frozen masked-LM head; `offline_teacher.models.replay.Replay` implements it."""

    def decoder_input(self, last_hidden: Tensor) -> Tensor:
        """Returns the decoder's input [n, D], in the head's dtype, for hidden states [n, D]."""

    @property
    def decoder_weight(self) -> Tensor:
        """[V, D]"""

    @property
    def decoder_bias(self) -> Tensor:
        """[V]"""


class SoftTarget(Protocol):
    """The teacher's distributions at N positions, which the loss reads chunk by chunk."""

    kernel: ClassVar[Kernel]
    """The function of `kl_loss` that compares the student's logits with ``arguments``."""

    def __len__(self) -> int:
        """N"""

    def buffer(self, positions: int) -> Tensor | None:
        """Returns an empty tensor [positions, V] for ``arguments``; None if ``arguments`` needs no buffer."""

    def arguments(self, rows: slice, buffer: Tensor | None) -> tuple[Tensor, ...]:
        """Returns the kernel's arguments for the positions ``rows``, a row per position; ``buffer``, if it is
        among them, may have more rows."""


@dataclass(frozen=True)
class ExactTarget:
    """The teacher's full distribution at any temperature, from its last hidden states."""

    head: Decoder
    hidden: Tensor
    """Last hidden states [N, D], any float dtype; int8 states are already multiplied by their scale."""
    kernel: ClassVar[Kernel] = staticmethod(exact_kernel)

    def __len__(self) -> int:
        return len(self.hidden)

    def buffer(self, positions: int) -> Tensor:
        return self.head.decoder_weight.new_empty(positions, len(self.head.decoder_weight))

    def arguments(self, rows: slice, buffer: Tensor | None) -> tuple[Tensor, ...]:
        assert buffer is not None
        self.logits(rows, out=buffer[: rows.stop - rows.start])
        return (buffer,)

    def logits_without_bias(self, rows: slice, out: Tensor) -> Tensor:
        """Writes the teacher's logits [n, V] without ``head.decoder_bias`` to ``out``."""
        return torch.mm(self.head.decoder_input(self.hidden[rows]), self.head.decoder_weight.t(), out=out)

    def logits(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Returns the teacher's logits [n, V], in the head's dtype, in ``out`` if given."""
        z = self.head.decoder_input(self.hidden[rows])
        return torch.addmm(self.head.decoder_bias, z, self.head.decoder_weight.t(), out=out)


@dataclass(frozen=True)
class _AlignedHead:
    """A teacher's head with an aligned decoder: rows are appended by `aligned_decoder`."""

    head: Decoder
    decoder_weight: Tensor
    decoder_bias: Tensor

    def decoder_input(self, last_hidden: Tensor) -> Tensor:
        return self.head.decoder_input(last_hidden)


def aligned(target: SoftTarget | None) -> SoftTarget | None:
    """Returns the target with an aligned decoder, so that its logits have the student's columns."""
    if not isinstance(target, ExactTarget):
        return target
    head = target.head
    return replace(target, head=_AlignedHead(head, *aligned_decoder(head.decoder_weight, head.decoder_bias)))


@dataclass(frozen=True)
class TopkTarget:
    """The K most likely tokens with their exact probabilities, and all others as one bucket, the tail."""

    topk_ids: Tensor
    """Token ids [N, K], distinct within a row."""
    topk_logits: Tensor
    """[N, K], not divided by the temperature; float16 as in the store, or a wider dtype."""
    logsumexp: Tensor
    """[N], over the whole vocabulary, of logits / temperature; float32 or float64."""
    temperature: float
    kernel: ClassVar[Kernel] = staticmethod(topk_kernel)

    def __len__(self) -> int:
        return len(self.topk_ids)

    def buffer(self, positions: int) -> None:
        return None

    def arguments(self, rows: slice, buffer: Tensor | None) -> tuple[Tensor, ...]:
        return self.probabilities(rows)

    def probabilities(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ids int64 [n, K], their probabilities p [n, K], and the tail's probability [n]; p and tail
        sum to 1.

        p_k = exp(logit_k / T - logsumexp_T) needs no renormalisation. With a = log sum_k p_k, the tail is
        -expm1(a). If the tail is nearly 0, this suffers cancellation; its absolute error is then that of the
        p_k, about 2^-12 |logit| / T from the rounding of float16 logits. If rounding makes a > 0, the tail is
        0, and p is divided by exp(a), so that the gradient still sums to 0.
        """
        logsumexp = self.logsumexp[rows]
        log_p = self.topk_logits[rows].to(logsumexp.dtype) / self.temperature - logsumexp[:, None]
        log_sum = torch.logsumexp(log_p, dim=1)
        p = torch.exp(log_p - log_sum.clamp_min(0)[:, None])
        return self.topk_ids[rows].long(), p, -torch.expm1(log_sum.clamp_max(0))
