"""Errors of stored distributions: probability mass kept by top-k, and each form's error of the student's
gradient.

Everything here is dense and exact on a few hundred positions, in float32 and float64, and is compared with
the teacher in float32. The student stage is not used. Axes: N positions, K top-k, V vocabulary, D hidden.
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
    from offline_teacher.planning.sample import Knowledge

CLOSE_STEP = 0.05
"""The student close to the teacher has 95 % of the teacher's hidden states and 5 % of the first student's."""
CHUNK_LOGITS = 1 << 22
"""Logits that exist at once."""


class DenseHead(nn.Module):
    """A copy of a model's masked-LM head whose parameters take gradients: hidden [N, D] -> logits [N, V]."""

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
        """Positions whose logits may exist at once."""
        return max(1, CHUNK_LOGITS // self.vocab_size)


@torch.no_grad()
def kept_mass(
    head: DenseHead, hidden: Tensor, ks: Sequence[int], temperatures: Sequence[float]
) -> np.ndarray:
    """Mean probability of the k most likely tokens at N positions, hidden [N, D]: float64 [T, k]."""
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
    """A form in which a store can hold the teacher's distribution: either ``hidden`` or ``top_k`` is set."""

    name: str
    hidden: Tensor | None = None
    """[N, D] as read back from the store: the exact distribution of these."""
    top_k: int = 0
    tail: bool = False
    """What is outside the top k is one bucket of exactly known mass; else the top k are scaled to 1."""

    def gradient(
        self, head: DenseHead, rows: slice, teacher: Tensor, q: Tensor, temperature: float
    ) -> Tensor:
        """Of T^2 KL(target || q) with respect to the student's logits, over T: [n, V] float64.

        ``teacher`` float32 logits and student ``q`` at T, both [n, V]. q - p where the target p is a whole
        distribution. With a tail bucket of mass t, matched against the student's own tail mass r: q - p
        inside the top k, q (1 - t / r) outside.
        """
        if self.hidden is not None:
            return q - torch.softmax(head(self.hidden[rows]).double() / temperature, -1)
        best, ids = teacher.topk(self.top_k)
        total = torch.logsumexp(
            teacher.double() / temperature, -1, keepdim=True
        ).float()  # as a store holds it
        p = torch.exp(best.half().double() / temperature - total)
        if not self.tail:
            return q.scatter_add(1, ids, -p / p.sum(-1, keepdim=True))
        tail = (1 - p.sum(-1, keepdim=True)).clamp_min(0)
        outside = q.scatter(1, ids, 0.0)  # its sum is not 1 minus the rest: that is 0 long before it is
        share = outside / outside.sum(-1, keepdim=True).clamp_min(1e-300)
        return (q - tail * share).scatter(1, ids, q.gather(1, ids) - p)


def renormalised(top_k: int) -> str:
    return f"top-{top_k}, renormalised"


def tail_bucket(top_k: int) -> str:
    return f"top-{top_k} + exact tail bucket"


def hidden_name(stored: str, replay_layers: int = 0) -> str:
    """Of hidden states in the format ``stored``, from which ``replay_layers`` layers are replayed."""
    if not replay_layers:
        return f"{stored} output of the last layer"
    return f"{stored} input of the last {'layer' if replay_layers == 1 else f'{replay_layers} layers'}"


def exact(stored: str, replay_layers: int = 0) -> str:
    return f"exact, {hidden_name(stored, replay_layers)}"


def as_stored(hidden: Tensor, stored: str) -> Tensor:
    """Hidden states [..., D] as read back, float32, from a store that keeps them in float16 or int8."""
    if stored == "int8":
        return dequantise(*quantise(hidden))
    return hidden.half().float()


def top_k_targets(top_k: int) -> list[SoftTarget]:
    return [
        SoftTarget(renormalised(top_k), top_k=top_k),
        SoftTarget(tail_bucket(top_k), top_k=top_k, tail=True),
    ]


def gradient_errors(
    head: DenseHead, teacher: Tensor, student: Tensor, targets: Sequence[SoftTarget], temperature: float
) -> dict[str, float]:
    """Relative error of the student's head gradient under each target against the dense teacher's.

    teacher, student: hidden states float32 [N, D]; the student has the teacher's head. The gradient of T^2
    KL(p_T || q_T), summed over the N positions, with respect to all parameters of the head; errors are norms
    of differences over the norm of the dense gradient. They are not finite if that norm is 0 (a student equal
    to its teacher). The head's gradient is linear in the gradient with respect to the logits, so the
    difference is taken at the logits and propagated through the head.
    """
    norms = []
    for target in [None, *targets]:
        head.zero_grad()
        for start in range(0, len(teacher), head.chunk):
            rows = slice(start, start + head.chunk)
            with torch.no_grad():
                logits = head(teacher[rows])
                p = torch.softmax(logits.double() / temperature, -1)
            ours = head(student[rows])
            with torch.no_grad():
                q = torch.softmax(ours.double() / temperature, -1)
                g = q - p
                if target is not None:
                    g = target.gradient(head, rows, logits, q, temperature) - g
            ours.backward((temperature * g).float())
        squares = [parameter.grad.double().square().sum() for parameter in head.parameters()]  # type: ignore[union-attr]
        norms.append(torch.stack(squares).sum().sqrt())
    head.zero_grad()
    return {target.name: float(norm / norms[0]) for target, norm in zip(targets, norms[1:], strict=True)}


def compare_targets(
    knowledge: Knowledge, positions: np.ndarray, top_k: int, temperature: float
) -> dict[str, Any]:
    """``gradient_errors`` of every soft target for the student as it starts and for one close to the teacher.

    ``positions``: flat [N].
    """
    teacher, student = knowledge.last_hidden(positions), knowledge.student_hidden(positions)
    targets = top_k_targets(top_k)
    targets += [SoftTarget(f"exact, {name}", hidden=last) for name, last in knowledge.forms(positions)]
    close = teacher + CLOSE_STEP * (student - teacher)
    return {
        "temperature": temperature,
        "positions": len(teacher),
        "top_k": top_k,
        "close_step": CLOSE_STEP,
        "at_initialisation": gradient_errors(knowledge.head, teacher, student, targets, temperature),
        "close_to_teacher": gradient_errors(knowledge.head, teacher, close, targets, temperature),
    }


# Relations (MiniLMv2, arXiv 2012.15828): B sequences, L length, A relation heads, d = D / A


def relation_gradient(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_count: Tensor, heads: int
) -> Tensor:
    """float64, flat: of the sum over relations, heads and real query positions of KL(teacher || student).

    ``student`` and ``teacher``: queries, keys and values [B, L, D]. The gradient is with respect to the
    student's.
    """
    gradients = []
    for own, other in zip(student, teacher, strict=True):
        own = own.detach().double().requires_grad_()
        p, q = (_log_relation(x.double(), token_count, heads) for x in (other.detach(), own))
        real = torch.arange(own.shape[1]) < token_count[:, None]  # [B, L]
        rows = (p.exp() * (p - q)).sum(-1)  # [B, A, L]
        (gradient,) = torch.autograd.grad((rows * real[:, None]).sum(), own)
        gradients.append(gradient.flatten())
    return torch.cat(gradients)


def _log_relation(x: Tensor, token_count: Tensor, heads: int) -> Tensor:
    """log softmax(x x^T / sqrt(d)) [B, A, L, L] over real positions; very low behind them."""
    count, length, width = x.shape
    x = x.view(count, length, heads, width // heads).transpose(1, 2)  # [B, A, L, d]
    scores = x @ x.transpose(-1, -2) * (width // heads) ** -0.5
    hidden = torch.arange(length) >= token_count[:, None]
    return torch.log_softmax(scores.masked_fill(hidden[:, None, None, :], -1e30), -1)
