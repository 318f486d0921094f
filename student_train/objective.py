"""From a micro-batch to its loss: which positions, which soft target, which denominators.

Axes: B batch, L length, M masked positions, P recorded positions (L or M), N positions that count, K top-k,
T temperatures, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infra.errors import UserError
from infra.sections import SOFT_TARGETS, StoreNeeds, Train
from student_train.losses import LossTerms, triple_loss
from student_train.soft_targets import ExactTarget, SoftTarget, TeacherHead, TopkTarget
from student_train.stream import Batch
from student_train.vocabulary_kernels import NO_LABEL

if TYPE_CHECKING:
    from offline_teacher.store.schema import Layout
    from student_train.student import StudentModel


def soft_target_kind(train: Train, layout: Layout) -> str | None:
    """``exact``, ``topk``, or None where alpha_ce is 0. UserError where the store lacks what is asked for."""
    if train.alpha_cos and layout.hidden_states == "none":
        raise UserError(
            "train.alpha_cos: the cosine term needs hidden states, which the store does not hold; "
            "set train.alpha_cos: 0 or run the teacher with store.hidden_states: float16"
        )
    if train.kl_positions == "all" and train.alpha_ce and layout.positions == "masked":
        raise UserError(
            "train.kl_positions: all, but the store holds masked positions only; set it to masked "
            "or run the teacher with store.positions: all"
        )
    kind = train.soft_target_kind(layout.hidden_states)
    if kind is None:
        return None
    needs = SOFT_TARGETS[kind]
    if needs.hidden_states and layout.hidden_states == "none":
        raise UserError(
            f"train.soft_targets: {kind} needs hidden states, which the store does not hold; "
            "set another kind or run the teacher with store.hidden_states: float16"
        )
    if needs.top_k and layout.top_k == 0:
        raise UserError(
            f"train.soft_targets: {kind} needs top-k logits, which the store does not hold; "
            "set another kind or run the teacher with store.top_k: 64"
        )
    if needs.top_k and train.temperature not in layout.temperatures:
        raise UserError(
            f"train.temperature: {train.temperature:g} is not among the store's temperatures "
            f"{list(layout.temperatures)}, which {kind} needs; use one of them or train.soft_targets: exact"
        )
    return kind


def needs_of(train: Train, layout: Layout) -> StoreNeeds:
    """What the loss reads of the store: for its soft targets, and for the cosine."""
    kind = soft_target_kind(train, layout)
    needs = StoreNeeds() if kind is None else SOFT_TARGETS[kind]
    return replace(needs, hidden_states=needs.hidden_states or train.alpha_cos > 0)


def columns_needed(train: Train, layout: Layout) -> list[str]:
    """The teacher's columns that the loss reads."""
    needs = needs_of(train, layout)
    names = ["topk_ids", "topk_logits", "logsumexp"] if needs.top_k else []
    return [*names, "hidden_states"] if needs.hidden_states else names


@dataclass(frozen=True)
class Positions:
    """The N positions of a micro-batch that the teacher recorded, flattened."""

    student_hidden: Tensor  # [N, D] of the student
    labels: Tensor  # int64 [N], NO_LABEL where not masked
    recorded: Tensor  # int64 [N], index into the store's [B * P]


def positions_of(hidden: Tensor, batch: Batch, masked_only: bool) -> Positions:
    """Picks from the student's hidden [B, L, D] the positions recorded: non-pad ones, or masked ones only."""
    B, L, _ = hidden.shape  # noqa: N806
    slots = batch.masked_positions >= 0  # [B, M]
    first = torch.arange(B, device=hidden.device)[:, None] * L  # of each sequence in [B * L]
    masked_at = (first + batch.masked_positions)[slots]  # [sum of masks]
    if masked_only:
        recorded = slots.flatten().nonzero()[:, 0]
        return Positions(hidden.flatten(0, 1)[masked_at], batch.masked_labels[slots], recorded)
    labels = torch.full((B * L,), NO_LABEL, dtype=torch.int64, device=hidden.device)
    labels[masked_at] = batch.masked_labels[slots]
    recorded = attention_mask(batch).flatten().nonzero()[:, 0]
    return Positions(hidden.flatten(0, 1)[recorded], labels[recorded], recorded)


def attention_mask(batch: Batch) -> Tensor:
    """bool [B, L], true at non-pad positions."""
    return torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device) < batch.token_count[:, None]


def teacher_hidden(batch: Batch, recorded: Tensor, dtype: torch.dtype) -> Tensor:
    """The teacher's hidden states [N, D] of the positions, int8 ones multiplied by their scale."""
    assert batch.hidden_states is not None
    hidden = batch.hidden_states.flatten(0, 1)[recorded]
    if batch.hidden_scale is None:
        return hidden.to(dtype)
    return (hidden.float() * batch.hidden_scale.flatten()[recorded][:, None]).to(dtype)


@dataclass(frozen=True)
class Objective:
    """The triple loss of a recipe on the micro-batches of a store."""

    train: Train
    layout: Layout
    head: TeacherHead | None
    """Needed for exact soft targets; in the dtype the student computes in."""

    @property
    def masked_only(self) -> bool:
        return self.layout.positions == "masked"

    def __call__(self, model: StudentModel, batch: Batch, tokens: int, masked: int) -> LossTerms:
        """This micro-batch's share of the loss; ``tokens`` and ``masked`` are counts of the whole step."""
        train = self.train
        hidden = model.body(batch.input_ids, attention_mask(batch).long())
        at = positions_of(hidden, batch, self.masked_only)
        kl_masked = train.kl_positions == "masked" and not self.masked_only
        teacher = None
        if needs_of(train, self.layout).hidden_states:
            teacher = teacher_hidden(batch, at.recorded, hidden.dtype)
        return triple_loss(
            model.head_transform(at.student_hidden),
            model.decoder_weight,
            model.decoder_bias,
            self.target(batch, at.recorded, teacher, train.temperature),
            at.labels,
            at.labels != NO_LABEL if kl_masked else None,
            model.project(at.student_hidden),
            teacher if train.alpha_cos else None,
            temperature=train.temperature,
            alpha_ce=train.alpha_ce,
            alpha_mlm=train.alpha_mlm,
            alpha_cos=train.alpha_cos,
            tokens=masked if self.masked_only else tokens,
            masked=masked,
            kl_tokens=masked if train.kl_positions == "masked" or self.masked_only else tokens,
            compile=train.compile,
        )

    def target(
        self, batch: Batch, recorded: Tensor, teacher: Tensor | None, temperature: float
    ) -> SoftTarget | None:
        """The soft target of the positions at ``temperature``, in the form the recipe chose."""
        if kind := soft_target_kind(self.train, self.layout):
            return TARGETS[kind](self, batch, recorded, teacher, temperature)
        return None


def exact_target(
    objective: Objective, batch: Batch, recorded: Tensor, teacher: Tensor | None, temperature: float
) -> ExactTarget:
    assert objective.head is not None
    assert teacher is not None
    return ExactTarget(objective.head, teacher)


def topk_target(
    objective: Objective, batch: Batch, recorded: Tensor, teacher: Tensor | None, temperature: float
) -> TopkTarget:
    assert batch.topk_ids is not None
    assert batch.topk_logits is not None
    assert batch.logsumexp is not None
    column = objective.layout.temperatures.index(temperature)
    return TopkTarget(
        batch.topk_ids.flatten(0, 1)[recorded],
        batch.topk_logits.flatten(0, 1)[recorded],
        batch.logsumexp.flatten(0, 1)[recorded][:, column],
        temperature,
    )


TARGETS: dict[str, Callable[[Objective, Batch, Tensor, Tensor | None, float], SoftTarget]] = {
    "exact": exact_target,
    "topk": topk_target,
}
"""How each kind of ``infra.sections.SOFT_TARGETS`` is made of a micro-batch, of the places recorded in it, of
the teacher's hidden states there (where the loss reads any), and of the temperature."""
