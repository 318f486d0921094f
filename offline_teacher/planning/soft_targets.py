"""Computes how much probability top-k keeps, and how wrong a student's gradient is with each soft target.

The reference is the gradient from the teacher's full distribution in float32. All gradients are computed
without the kernels of the student stage, in float32 and float64, at a few hundred positions.
Axes: N positions, K top-k, V vocabulary, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from offline_teacher.inference.quantise import dequantise, quantise
from offline_teacher.models.head import masked_lm_head

if TYPE_CHECKING:
    from offline_teacher.planning.teacher_sample import SampledTeacher

CLOSE_STEP = 0.05
"""Share of the new student in the hidden states of the student close to the teacher; the teacher has 95 %."""
CHUNK_LOGITS = 1 << 22
"""Largest number of logits in memory at once."""


class DenseHead(nn.Module):
    """A copy of a model's masked-LM head with trainable parameters: hidden [N, D] -> logits [N, V]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._head = copy.deepcopy(masked_lm_head(model))
        self.parts = nn.ModuleList(self._head.modules()).requires_grad_(True)

    def forward(self, hidden: Tensor) -> Tensor:
        z = self._head.decoder_input(hidden)
        return z @ self._head.decoder_weight.T + self._head.decoder_bias

    @property
    def vocab_size(self) -> int:
        return len(self._head.decoder_weight)

    @property
    def chunk(self) -> int:
        """Largest number of positions whose logits are in memory at once."""
        return max(1, CHUNK_LOGITS // self.vocab_size)


@torch.no_grad()
def kept_mass(
    head: DenseHead, hidden: Tensor, ks: Sequence[int], temperatures: Sequence[float]
) -> np.ndarray:
    """Returns the mean probability of the k most likely tokens over the N positions of ``hidden`` [N, D]:
    float64 [temperatures, ks]; NaN without positions."""
    total = torch.zeros(len(temperatures), len(ks), dtype=torch.float64)
    for rows in hidden.split(head.chunk):
        logits = head(rows).double()
        best = logits.topk(max(ks)).values  # descending
        for j, temperature in enumerate(temperatures):
            p = torch.exp(best / temperature - torch.logsumexp(logits / temperature, -1, keepdim=True))
            total[j] += p.cumsum(-1)[:, [k - 1 for k in ks]].sum(0)
    mean: np.ndarray = (total / len(hidden)).numpy() if len(hidden) else np.full(total.shape, np.nan)
    return mean


# Soft targets


@dataclass(frozen=True)
class SoftTarget:
    """The teacher's distribution as a store holds it. Either ``hidden`` or ``top_k`` is set."""

    name: str
    hidden: Tensor | None = None
    """Last hidden states [N, D] as read from the store; they give the distribution over all tokens."""
    top_k: int = 0
    """Number of most likely tokens whose logits are stored."""
    tail: bool = False
    """Whether the other tokens are one bucket of exactly known probability. If not, the top k sum to 1."""

    def gradient(
        self, head: DenseHead, rows: slice, teacher: Tensor, q: Tensor, temperature: float
    ) -> Tensor:
        """Returns the gradient of T^2 KL(target || q) with respect to the student's logits, divided by T.

        ``teacher``: float32 logits [n, V]; ``q``: the student's probabilities at T [n, V]. The result is
        float64 [n, V]. Without a tail bucket it is q - p for the target p. With a tail bucket it is q - p for
        the top k and q (1 - t / r) for other tokens (tail probability t of the target, r of the student).
        """
        if self.hidden is not None:
            return q - torch.softmax(head(self.hidden[rows]).double() / temperature, -1)
        best, ids = teacher.topk(self.top_k)
        total = torch.logsumexp(teacher.double() / temperature, -1, keepdim=True).float()  # stored as float32
        p = torch.exp(best.half().double() / temperature - total)
        if not self.tail:
            return q.scatter_add(1, ids, -p / p.sum(-1, keepdim=True))
        tail = (1 - p.sum(-1, keepdim=True)).clamp_min(0)
        outside = q.scatter(1, ids, 0.0)  # summed below, because 1 minus the top k's sum rounds to 0
        share = outside / outside.sum(-1, keepdim=True).clamp_min(1e-300)
        return (q - tail * share).scatter(1, ids, q.gather(1, ids) - p)


def renormalised_name(top_k: int) -> str:
    return f"top-{top_k}, renormalised"


def tail_bucket_name(top_k: int) -> str:
    return f"top-{top_k} + exact tail bucket"


def form_name(number_format: str, replay_layers: int = 0) -> str:
    """Names stored hidden states by their number format and the number of layers to replay on them."""
    if not replay_layers:
        return f"{number_format} output of the last layer"
    return f"{number_format} input of the last {'layer' if replay_layers == 1 else f'{replay_layers} layers'}"


def exact_name(number_format: str, replay_layers: int = 0) -> str:
    return f"exact, {form_name(number_format, replay_layers)}"


def round_as_stored(hidden: Tensor, number_format: str) -> Tensor:
    """Rounds hidden states [..., D] as a store in float16 or int8 does; returns float32."""
    if number_format == "int8":
        return dequantise(*quantise(hidden))
    return hidden.half().float()


def top_k_targets(top_k: int) -> list[SoftTarget]:
    return [
        SoftTarget(renormalised_name(top_k), top_k=top_k),
        SoftTarget(tail_bucket_name(top_k), top_k=top_k, tail=True),
    ]


def gradient_errors(
    head: DenseHead, teacher: Tensor, student: Tensor, targets: Sequence[SoftTarget], temperature: float
) -> dict[str, float]:
    """Returns for each soft target the relative error of the gradient of the student's head.

    ``teacher``, ``student``: last hidden states, float32 [N, D]; both use the teacher's head. The gradient is
    that of T^2 KL(p || q), summed over positions, with respect to all parameters of the head. The error is
    |gradient from the target - exact gradient| / |exact gradient|; the exact gradient uses the teacher's full
    distribution. Errors are not finite if the exact gradient is 0 (the student equals its teacher). Since the
    head's gradient is linear in that of the logits, only the difference at the logits is propagated.
    """
    norms = []
    for target in [None, *targets]:
        head.zero_grad()
        for start in range(0, len(teacher), head.chunk):
            rows = slice(start, start + head.chunk)
            with torch.no_grad():
                logits = head(teacher[rows])
                p = torch.softmax(logits.double() / temperature, -1)
            student_logits = head(student[rows])
            with torch.no_grad():
                q = torch.softmax(student_logits.double() / temperature, -1)
                g = q - p
                if target is not None:
                    g = target.gradient(head, rows, logits, q, temperature) - g
            student_logits.backward((temperature * g).float())
        squares = [parameter.grad.double().square().sum() for parameter in head.parameters()]  # type: ignore[union-attr]
        norms.append(torch.stack(squares).sum().sqrt())
    head.zero_grad()
    return {target.name: float(norm / norms[0]) for target, norm in zip(targets, norms[1:], strict=True)}


def compare_targets(
    outputs: SampledTeacher, positions: np.ndarray, top_k: int, temperature: float
) -> dict[str, Any]:
    """Returns ``gradient_error`` of the report: the errors of every soft target, for a student before its
    first step and for one close to the teacher. ``positions``: flat [N]."""
    teacher, student = outputs.last_hidden(positions), outputs.student_hidden(positions)
    targets = top_k_targets(top_k)
    targets += [SoftTarget(f"exact, {name}", hidden=last) for name, last in outputs.stored_forms(positions)]
    close = teacher + CLOSE_STEP * (student - teacher)
    return {
        "temperature": temperature,
        "positions": len(teacher),
        "top_k": top_k,
        "close_step": CLOSE_STEP,
        "at_initialisation": gradient_errors(outputs.head, teacher, student, targets, temperature),
        "close_to_teacher": gradient_errors(outputs.head, teacher, close, targets, temperature),
    }


# Relations (MiniLMv2, arXiv 2012.15828): B sequences, L length, A relation heads, d = D / A


def relation_gradient(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_count: Tensor, heads: int
) -> Tensor:
    """Returns the gradient of MiniLMv2's loss with respect to the student's queries, keys and values.

    ``student`` and ``teacher``: queries, keys and values [B, L, D]. The loss is KL(teacher || student) summed
    over relations, heads and query positions that are not padding. The result is float64, flattened.
    """
    gradients = []
    for vectors, target in zip(student, teacher, strict=True):
        vectors = vectors.detach().double().requires_grad_()
        log_p, log_q = (_log_relation(x.double(), token_count, heads) for x in (target.detach(), vectors))
        real = torch.arange(vectors.shape[1]) < token_count[:, None]  # [B, L]
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)  # [B, A, L]
        (gradient,) = torch.autograd.grad((divergence * real[:, None]).sum(), vectors)
        gradients.append(gradient.flatten())
    return torch.cat(gradients)


def _log_relation(x: Tensor, token_count: Tensor, heads: int) -> Tensor:
    """Returns log softmax(x x^T / sqrt(d)) [B, A, L, L] of x [B, L, D]; padding gets about -1e30."""
    count, length, width = x.shape
    x = x.view(count, length, heads, width // heads).transpose(1, 2)  # [B, A, L, d]
    scores = x @ x.transpose(-1, -2) * (width // heads) ** -0.5
    padding = torch.arange(length) >= token_count[:, None]
    return torch.log_softmax(scores.masked_fill(padding[:, None, None, :], -1e30), -1)
