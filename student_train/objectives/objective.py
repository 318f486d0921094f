"""From a micro-batch to its loss: which terms, which soft target, which denominators.

    loss = alpha_ce T^2 KL(p_T || q_T) + alpha_mlm CE + alpha_cos (1 - cos) + alpha_relation R

Axes: B batch, L length, P recorded positions (L or M), N positions that count, K top-k, T temperatures,
D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infra.errors import UserError
from infra.sections import SOFT_TARGETS, StoreNeeds, Train
from infra.sections import TERMS as LOSS_WEIGHTS
from student_train.data.collate import Batch
from student_train.objectives.embedding import embedding_distance
from student_train.objectives.relations import RELATIONS, relation_heads, relation_loss
from student_train.objectives.soft_targets import ExactTarget, SoftTarget, TopkTarget
from student_train.objectives.triple_loss import LossTerms, triple_loss
from student_train.student.model import needs_head

if TYPE_CHECKING:
    from offline_teacher.families.recording import QueriesKeysValues
    from offline_teacher.families.replay import Replay
    from offline_teacher.store.schema import Layout
    from student_train.student.model import StudentModel

TERMS = ("loss", "kl", "mlm", "cosine", "relation", "embedding")


def soft_target_kind(train: Train, layout: Layout) -> str | None:
    """``exact``, ``topk``, or None where alpha_ce is 0. UserError where the store lacks what is needed."""
    if layout.positions == "pooled":
        _check_pooled(train)
        return None
    if train.alpha_embedding:
        raise UserError(
            "train.alpha_embedding: the store holds no vectors of whole texts; set train.alpha_embedding: 0"
            " or run the teacher with store.positions: pooled"
        )
    if train.alpha_cos and layout.hidden_states == "none":
        raise UserError(
            "train.alpha_cos: the cosine term needs hidden states, which the store does not hold; "
            "set train.alpha_cos: 0 or run the teacher with store.hidden_states: float16"
        )
    if train.alpha_relation and layout.replay_layers == 0:
        raise UserError(
            "train.alpha_relation: relations need the input of the teacher's top layer, which the store does"
            " not hold; set train.alpha_relation: 0 or run the teacher with store.replay_layers: 1"
        )
    if train.alpha_mlm and layout.masked == 0:
        raise UserError(
            "train.alpha_mlm: the text of the store is not masked; set train.alpha_mlm: 0 or run the teacher"
            " with masking.probability: 0.15"
        )
    if train.kl_positions == "masked" and train.alpha_ce and layout.masked == 0:
        raise UserError("train.kl_positions: masked, but the text of the store is not masked; set it to all")
    if train.kl_positions == "all" and train.alpha_ce and layout.positions == "masked":
        raise UserError(
            "train.kl_positions: all, but the store holds masked positions only; set it to masked "
            "or run the teacher with store.positions: all"
        )
    kind = train.soft_target_kind(layout.hidden_states)
    if kind is not None:
        _check_kind(kind, train, layout)
    return kind


def _check_pooled(train: Train) -> None:
    others = [name for name in LOSS_WEIGHTS if name != "alpha_embedding" and getattr(train, name)]
    if others or not train.alpha_embedding:
        raise UserError(
            f"train.{(others or ['alpha_embedding'])[0]}: the store holds one pooled vector a text: set"
            " train.alpha_embedding: 1 and the other weights of the loss to 0, or run the teacher with"
            " store.positions: all"
        )


def _check_kind(kind: str, train: Train, layout: Layout) -> None:
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


def needs_of(train: Train, layout: Layout) -> StoreNeeds:
    """What the loss reads of the store: for its soft targets, the cosine and relations."""
    kind = soft_target_kind(train, layout)
    needs = StoreNeeds() if kind is None else SOFT_TARGETS[kind]
    hidden = needs.hidden_states or train.alpha_cos > 0 or train.alpha_relation > 0
    return replace(needs, hidden_states=hidden)


def columns_needed(train: Train, layout: Layout) -> list[str]:
    """The teacher's columns that the loss reads."""
    needs = needs_of(train, layout)
    if layout.positions == "pooled":
        return ["embedding"]
    names = ["topk_ids", "topk_logits", "logsumexp"] if needs.top_k else []
    if needs.hidden_states:
        names += ["hidden_states", "hidden_scale"] if layout.hidden_states == "int8" else ["hidden_states"]
    return names


def stored_states(batch: Batch, dtype: torch.dtype) -> Tensor:
    """The stored hidden states [B, P, D], int8 ones multiplied by their scale."""
    assert batch.hidden_states is not None
    if batch.hidden_scale is None:
        return batch.hidden_states.to(dtype)
    return (batch.hidden_states.float() * batch.hidden_scale[..., None]).to(dtype)


def picked(values: Tensor, index: Tensor | None) -> Tensor:
    """[B, P, ...] -> [N, ...]: the rows of the flattened tensor at ``index``; None: all of them."""
    flat = values.flatten(0, 1)
    return flat if index is None else flat[index]


@dataclass(frozen=True)
class Taught:
    """What the frozen top of the teacher says of a micro-batch, as far as it was asked."""

    last_hidden: Tensor | None = None  # [N, D] of the teacher
    relations: dict[str, Tensor] | None = None  # queries, keys, values, each [B, L, D] of the teacher


@dataclass(frozen=True)
class Objective:
    """The loss of a recipe on the micro-batches of a store."""

    train: Train
    layout: Layout
    replay: Replay | None
    """Needed for exact soft targets, the cosine and relations; in the dtype the student computes in."""
    recorder: QueriesKeysValues | None = None
    """Of the student's layer whose relations are compared."""

    def __call__(
        self, model: StudentModel, batch: Batch, tokens: float, masked: float, sequences: float = 1.0
    ) -> LossTerms:
        """This micro-batch's share of the loss. ``tokens``, ``masked`` and ``sequences`` are counts of the
        whole step; only vectors of texts need the last."""
        train = self.train
        hidden = model.body(batch.input_ids, None if batch.full else batch.token_count)
        if self.layout.positions == "pooled":
            distance = self.embedding(model, hidden, batch) / sequences
            zero = LossTerms.zero(hidden.device)
            return replace(zero, total=train.alpha_embedding * distance, embedding=distance.detach())
        kind = soft_target_kind(train, self.layout)
        taught = self.taught(batch, hidden.dtype, bool(kind == "exact" or train.alpha_cos))
        terms = self._positions_terms(model, hidden, batch, taught, kind, tokens, masked)
        if not train.alpha_relation:
            return terms
        relation = self.relation(batch, taught, tokens)
        return replace(terms, total=terms.total + train.alpha_relation * relation, relation=relation.detach())

    def embedding(self, model: StudentModel, hidden: Tensor, batch: Batch) -> Tensor:
        """The distances of a micro-batch's vectors from the teacher's, added up; ``hidden``: [B, L, D]."""
        assert batch.embedding is not None
        return embedding_distance(model.vectors(hidden, batch.token_count), batch.embedding)

    def taught(self, batch: Batch, dtype: torch.dtype, last_hidden: bool) -> Taught:
        """Replays only what the loss needs: the last hidden states, the relations, or both at once."""
        relations = self.train.alpha_relation > 0
        if not (last_hidden or relations):
            return Taught()
        assert self.replay is not None
        states, count = stored_states(batch, dtype), None if batch.full else batch.token_count
        if not last_hidden:
            return Taught(None, _named(self.replay.queries_keys_values(states, count)))
        if not relations:
            return Taught(picked(self.replay.last_hidden(states, count), batch.recorded))
        last, vectors = self.replay.last_hidden_and_queries_keys_values(states, count)
        return Taught(picked(last, batch.recorded), _named(vectors))

    def _positions_terms(
        self,
        model: StudentModel,
        hidden: Tensor,
        batch: Batch,
        taught: Taught,
        kind: str | None,
        tokens: float,
        masked: float,
    ) -> LossTerms:
        """The terms over single positions: soft targets, masked LM, cosine."""
        train = self.train
        if not (train.alpha_ce or train.alpha_mlm or train.alpha_cos):
            return LossTerms.zero(hidden.device)
        masked_only = self.layout.positions == "masked"
        kl_masked = train.kl_positions == "masked" or masked_only
        student = picked(hidden, batch.positions)
        # KL and CE look at the masked positions alone, or at all.
        rows = None if masked_only or (kind and not kl_masked) else batch.masked_at
        vocabulary = needs_head(train)
        at = student if rows is None else student[rows]
        return triple_loss(
            model.head_transform(at) if vocabulary else at,
            model.decoder_weight if vocabulary else None,
            model.decoder_bias if vocabulary else None,
            self.target(batch, taught.last_hidden, train.temperature, kind, rows),
            batch.labels if rows is None else batch.labels[rows],
            model.project(student),
            taught.last_hidden if train.alpha_cos else None,
            temperature=train.temperature,
            alpha_ce=train.alpha_ce,
            alpha_mlm=train.alpha_mlm,
            alpha_cos=train.alpha_cos,
            tokens=masked if masked_only else tokens,
            masked=masked,
            kl_tokens=masked if kl_masked else tokens,
            compile=train.compile,
        )

    def target(
        self,
        batch: Batch,
        last_hidden: Tensor | None,
        temperature: float,
        kind: str | None,
        rows: Tensor | None = None,
    ) -> SoftTarget | None:
        """The soft target at ``temperature`` of the N positions, or of those at ``rows`` [n] of them."""
        if kind == "exact":
            assert self.replay is not None
            assert last_hidden is not None
            return ExactTarget(self.replay, last_hidden if rows is None else last_hidden[rows])
        return topk_target(self.layout, batch, temperature, rows) if kind == "topk" else None

    def relation(self, batch: Batch, taught: Taught, tokens: float) -> Tensor:
        """The share of R of a micro-batch whose student has just run; see `relation_loss`."""
        assert self.recorder is not None
        assert taught.relations is not None
        student = _named(self.recorder.take())
        heads = relation_heads(
            taught.relations["queries"].shape[-1], student["queries"].shape[-1], self.train.relation_heads
        )
        return relation_loss(
            student,
            taught.relations,
            batch.token_count,
            heads,
            tokens,
            dict(zip(RELATIONS, self.train.relation_weights, strict=True)),
            full=batch.full,
            compile=self.train.compile,
        )


def _named(vectors: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(RELATIONS, vectors, strict=True))


def topk_target(layout: Layout, batch: Batch, temperature: float, rows: Tensor | None = None) -> TopkTarget:
    """The stored top-k logits of the N positions, at a temperature whose logsumexp the store holds."""
    assert batch.topk_ids is not None
    assert batch.topk_logits is not None
    assert batch.logsumexp is not None
    ids, logits, logsumexp = (
        picked(column, batch.recorded) for column in (batch.topk_ids, batch.topk_logits, batch.logsumexp)
    )
    if rows is not None:
        ids, logits, logsumexp = ids[rows], logits[rows], logsumexp[rows]
    return TopkTarget(ids, logits, logsumexp[:, layout.temperatures.index(temperature)], temperature)
