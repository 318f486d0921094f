"""A reference implementation of distillation that runs the teacher in every step.

The formula is from DistilBERT's authors (huggingface/transformers-research-projects,
distillation/distiller.py, ``step``): dense logits of teacher and student, KL and cosine over the non-pad
positions, cross entropy over the masked positions.

Axes: B batch, L length, N non-pad positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from offline_teacher.models.recording import QueriesKeysValues
from student_train.data.collate import NO_LABEL, Batch
from student_train.data.loss_needs import relation_heads


def dense_inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns input ids, attention mask and labels (-100: none) [B, L] of a batch without teacher outputs."""
    ids = batch.input_ids
    labels = torch.full_like(ids, NO_LABEL).flatten()
    labels[slice(None) if batch.positions is None else batch.positions] = batch.labels
    mask = torch.arange(ids.shape[1], device=ids.device) < batch.token_count[:, None]
    return ids, mask.long(), labels.view_as(ids)


def live_loss(
    teacher: nn.Module,
    student: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    temperature: float = 2.0,
    alphas: tuple[float, float, float] = (5.0, 2.0, 1.0),
) -> dict[str, Tensor]:
    """Returns ``loss`` (with gradient), ``kl``, ``mlm`` and ``cosine``, all scalars. ``input_ids``,
    ``attention_mask`` and ``labels`` (-100: none) are [B, L]."""
    with torch.no_grad():
        t = teacher(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    s = student(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    real = attention_mask.bool()
    s_logits, t_logits = s.logits[real], t.logits[real]  # [N, V]
    kl = functional.kl_div(
        functional.log_softmax(s_logits / temperature, dim=-1),
        functional.softmax(t_logits / temperature, dim=-1),
        reduction="batchmean",
    )
    mlm = functional.cross_entropy(s.logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)
    s_hidden, t_hidden = s.hidden_states[-1][real], t.hidden_states[-1][real]  # [N, D]
    cosine = functional.cosine_embedding_loss(s_hidden, t_hidden, s_hidden.new_ones(len(s_hidden)))
    loss = alphas[0] * temperature**2 * kl + alphas[1] * mlm + alphas[2] * cosine
    return {"loss": loss, "kl": kl, "mlm": mlm, "cosine": cosine}


class LiveTriple:
    """Triple loss that runs the teacher in every step."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, temperature: float, alphas: tuple[float, float, float]
    ) -> None:
        self.teacher, self.student, self.temperature, self.alphas = teacher, student, temperature, alphas

    def loss(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return live_loss(self.teacher, self.student, ids, mask, labels, self.temperature, self.alphas)["loss"]

    def distances(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Returns KL(teacher || student) at T = 1 and 2, summed over the non-pad positions."""
        models = self.teacher, self.student
        p, q = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in models)
        return {
            f"kl_t{t:g}": functional.kl_div(
                functional.log_softmax(q / t, dim=-1),
                functional.log_softmax(p / t, dim=-1),
                reduction="sum",
                log_target=True,
            )
            for t in (1.0, 2.0)
        }


class LiveRelations:
    """MiniLMv2's relation loss that runs the teacher in every step. It compares the teacher's layer number
    ``replay_layers`` from the top with the student's last layer."""

    def __init__(self, teacher: nn.Module, student: nn.Module, replay_layers: int) -> None:
        self.teacher, self.student = teacher, student
        self._of_teacher = QueriesKeysValues(teacher, -replay_layers)
        self._of_student = QueriesKeysValues(student)

    def loss(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss, with gradient; ``labels`` are not used."""
        with torch.no_grad():
            self.teacher(input_ids=ids, attention_mask=mask)
        self.student(input_ids=ids, attention_mask=mask)
        s, t = self._of_student.take(), self._of_teacher.take()
        return dense_relation_loss(s, t, mask.sum(1), relation_heads(t[0].shape[-1], s[0].shape[-1]))

    def distances(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Returns the loss, summed over the non-pad positions."""
        return {"relation": self.loss(ids, mask, mask) * mask.sum()}


def dense_relation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_count: Tensor, heads: int
) -> Tensor:
    """Returns the loss by the formula of MiniLMv2, which keeps every tensor [B, heads, L, L] in memory.
    ``student``, ``teacher``: [B, L, D] per relation. The mean is over relations, heads and non-pad
    positions."""
    real = torch.arange(student[0].shape[1], device=student[0].device) < token_count[:, None]

    def log_relation(x: Tensor) -> Tensor:
        b, length, width = x.shape
        grouped = x.view(b, length, heads, width // heads).transpose(1, 2)
        scores = grouped @ grouped.transpose(2, 3) / (width // heads) ** 0.5
        return scores.masked_fill(~real[:, None, None, :], float("-inf")).log_softmax(-1)

    means = []
    for s, t in zip(student, teacher, strict=True):
        log_p, log_q = log_relation(t), log_relation(s)
        kl = (
            (log_p.exp() * (log_p - log_q)).masked_fill(~real[:, None, None, :], 0.0).sum(-1)
        )  # [B, heads, L]
        means.append(kl.transpose(1, 2)[real].mean())
    return torch.stack(means).mean()


def live_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)


def live_step(
    teacher: nn.Module,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    bfloat16: bool,
) -> float:
    """Does one optimiser step over micro-batches (ids, mask, labels), clipped at 5; returns the mean loss."""
    parts, total = list(batches), 0.0
    optimizer.zero_grad(set_to_none=True)
    for ids, mask, labels in parts:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
            loss = live_loss(teacher, student, ids, mask, labels)["loss"] / len(parts)
        loss.backward()
        total += float(loss.detach())
    nn.utils.clip_grad_norm_(student.parameters(), 5.0)
    optimizer.step()
    return total
