"""What a store makes of the teacher's probability: mass kept by k, and the error each form costs a student.

Everything here is dense and exact on a few hundred positions, in float32 and float64, against the teacher in
float32; nothing of the student stage is needed. Axes: N positions, K top-k, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import UserError
from infra.sections import Student
from offline_teacher.store.head import MlmHead
from offline_teacher.store.quantise import dequantise, quantise
from offline_teacher.teacher import LoadedTeacher

DISTILBERT_LAYERS = (0, 2, 4, 7, 9, 11)
"""What DistilBERT's authors took of BERT-base."""
STORED = ("int8", "float16")
"""What hidden states are stored in."""
CLOSE_STEP = 0.05
"""The student close to the teacher has 95 % of the teacher's hidden states and 5 % of the first student's."""
CHUNK_LOGITS = 1 << 22
"""Logits that exist at once."""


class DenseHead(nn.Module):
    """The masked-LM head with plain float32 parameters: hidden [N, D] -> logits [N, V]."""

    dense_weight: Tensor
    dense_bias: Tensor
    layer_norm_weight: Tensor
    layer_norm_bias: Tensor
    decoder_weight: Tensor
    decoder_bias: Tensor

    def __init__(self, head: MlmHead) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        for field in fields(head):
            if field.name not in ("hidden_act", "layer_norm_eps"):
                self.register_parameter(
                    field.name, nn.Parameter(torch.from_numpy(getattr(head, field.name).copy()))
                )
        self.act, self.eps = ACT2FN[head.hidden_act], head.layer_norm_eps

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.act(F.linear(hidden, self.dense_weight, self.dense_bias))
        x = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return F.linear(x, self.decoder_weight, self.decoder_bias)

    @property
    def vocab_size(self) -> int:
        return len(self.decoder_weight)

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
    return (total / len(hidden)).numpy()


# The student


def student_layers(student: Student, teacher_layers: int) -> list[int]:
    """Teacher layers the recipe's student starts from; of one with random weights, those it would have."""
    if student.layers == "every_second":
        return list(DISTILBERT_LAYERS) if teacher_layers == 12 else list(range(0, teacher_layers, 2))
    if isinstance(student.layers, str):
        count = int(student.layers.removeprefix("last:"))
        chosen = list(range(teacher_layers - count, teacher_layers))
    else:
        chosen = list(student.layers)
    if min(chosen) < 0 or max(chosen) >= teacher_layers:
        raise UserError(
            f"student.layers: {chosen} does not fit the teacher, whose layers are 0 to {teacher_layers - 1}"
        )
    return chosen


@contextmanager
def only_layers(loaded: LoadedTeacher, layers: Sequence[int]) -> Iterator[None]:
    """The teacher's encoder without its other layers, for a while: the student before its first step."""
    encoder: Any = loaded.model.encoder
    kept = encoder.layer
    encoder.layer = nn.ModuleList([kept[layer] for layer in layers])
    try:
        yield
    finally:
        encoder.layer = kept


# Soft targets


@dataclass(frozen=True)
class SoftTarget:
    """A form in which a store can hold the teacher. ``hidden`` or ``top_k`` say what it is of."""

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


def exact(stored: str) -> str:
    return f"exact, {stored} hidden states"


def as_stored(hidden: Tensor, stored: str) -> Tensor:
    """Hidden states [N, D] as read back, float32, from a store that keeps them in float16 or int8."""
    if stored == "int8":
        return torch.from_numpy(dequantise(*quantise(hidden.numpy())))
    return hidden.half().float()


def captured(stored: str, dtype: str) -> str:
    return f"exact, {dtype} teacher, {stored}"


def soft_targets(hidden: Tensor, top_k: int) -> list[SoftTarget]:
    """The forms that a store can hold of the teacher's hidden states float32 [N, D]."""
    return [
        SoftTarget(renormalised(top_k), top_k=top_k),
        SoftTarget(tail_bucket(top_k), top_k=top_k, tail=True),
        *(SoftTarget(exact(stored), hidden=as_stored(hidden, stored)) for stored in STORED),
    ]


def gradient_errors(
    head: DenseHead, teacher: Tensor, student: Tensor, targets: Sequence[SoftTarget], temperature: float
) -> dict[str, float]:
    """Relative error of the student's head gradient under each target against the dense teacher's.

    teacher, student: hidden states float32 [N, D]; the student has the teacher's head. The gradient of
    T^2 KL(p_T || q_T), summed over the N positions, with respect to all parameters of the head; errors
    are norms of differences over the norm of the dense gradient, no finite numbers where that is 0 (a
    student that is its teacher). Linear in the gradient with respect to the logits, so the difference is
    carried through the head, not taken behind it.
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
    head: DenseHead,
    teacher: Tensor,
    student: Tensor,
    as_run: Tensor,
    dtype: str,
    top_k: int,
    temperature: float,
) -> dict[str, Any]:
    """``gradient_errors`` of every soft target for the student as it starts and for one close to the teacher.

    All hidden states float32 [N, D]; ``as_run`` are those of the teacher in ``dtype``, the recipe's. Where
    that is not float32, ``as_captured`` says by which target each exact one is met again with them.
    """
    targets = soft_targets(teacher, top_k)
    if dtype != "float32":
        targets += [SoftTarget(captured(kind, dtype), hidden=as_stored(as_run, kind)) for kind in STORED]
    close = teacher + CLOSE_STEP * (student - teacher)
    return {
        "temperature": temperature,
        "positions": len(teacher),
        "top_k": top_k,
        "as_captured": {exact(kind): captured(kind, dtype) for kind in STORED if dtype != "float32"},
        "close_step": CLOSE_STEP,
        "at_initialisation": gradient_errors(head, teacher, student, targets, temperature),
        "close_to_teacher": gradient_errors(head, teacher, close, targets, temperature),
    }
