"""Computes the loss of a micro-batch: its terms, its soft target and its denominators.

    loss = alpha_ce T^2 KL(p_T || q_T) + alpha_mlm CE + alpha_cos (1 - cos) + alpha_relation R
           + alpha_embedding E

p_T, q_T: distributions of teacher and student at temperature T. R: the relation loss. E: the distance
of embeddings.

Axes: B batch, L length, M masked, P recorded positions (L or M), N positions without padding, K top-k,
T temperatures, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from infra.settings.sections import Train
from offline_teacher.models.pooling import Pooling, pool
from student_train.data.collate import Batch
from student_train.objectives.needs import soft_target_kind
from student_train.objectives.relations import RELATIONS, relation_heads, relation_loss
from student_train.objectives.soft_targets import ExactTarget, SoftTarget, TopkTarget
from student_train.objectives.triple_loss import LossTerms, triple_loss
from student_train.student.model import needs_head

if TYPE_CHECKING:
    from offline_teacher.models.replay import Replay
    from offline_teacher.models.split import Lower
    from offline_teacher.store.schema import Layout
    from student_train.student.model import StudentModel

TERMS = ("loss", "kl", "mlm", "cosine", "relation", "embedding")


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
    """What the student learns from in a micro-batch; a field is None if the loss does not need it."""

    last_hidden: Tensor | None = None  # [N, D] of the teacher
    relations: dict[str, Tensor] | None = None  # queries, keys, values, each [B, L, D] of the teacher
    vectors: Tensor | None = None  # [B, D], one of each text


@dataclass(frozen=True)
class Objective:
    """The loss of a recipe on the micro-batches of a store."""

    train: Train
    layout: Layout
    """Layout of the teacher's outputs; see `needs.taught_layout`."""
    replay: Replay | None
    """Runs the teacher's top layers, in the dtype of the student's computation. None: the loss reads only
    stored top-k logits or stored vectors."""
    live: Lower | None = None
    """The teacher's layers below the replayed ones, which run in every step. None: the hidden states are read
    from the store."""
    pooling: Pooling | None = None
    """How the teacher makes one vector of a text, where the loss compares such vectors."""

    def __call__(
        self, model: StudentModel, batch: Batch, tokens: float, masked: float, sequences: float = 1.0
    ) -> LossTerms:
        """This micro-batch's share of the loss. ``tokens``, ``masked`` and ``sequences`` are the
        denominators: totals over the whole step. Only the embedding term uses ``sequences``."""
        train, batch = self.train, self.with_live_states(batch)
        hidden, related = self.student(model, batch)
        kind = soft_target_kind(train, self.layout)
        taught = self.taught(batch, model.dtype, bool(kind == "exact" or train.alpha_cos))
        terms = LossTerms.zero(batch.input_ids.device)
        if hidden is not None and (needs_head(train) or train.alpha_cos):
            terms = self._positions_terms(model, hidden, batch, taught, kind, tokens, masked)
        if related is not None:
            relation = self.relation(batch, related, taught, tokens)
            total = terms.total + train.alpha_relation * relation
            terms = replace(terms, total=total, relation=relation.detach())
        if hidden is not None and train.alpha_embedding:
            distance = self.embedding(model, hidden, batch, taught) / sequences
            total = terms.total + train.alpha_embedding * distance
            terms = replace(terms, total=total, embedding=distance.detach())
        return terms

    def student(self, model: StudentModel, batch: Batch) -> tuple[Tensor | None, dict[str, Tensor] | None]:
        """The student's last hidden states [B, L, D], and its queries, keys and values, each [B, L, D].

        Either is None if the loss does not use it.
        """
        train, ids, count = self.train, batch.input_ids, None if batch.full else batch.token_count
        if not train.alpha_relation:
            return model.body(ids, count), None
        if not (needs_head(train) or train.alpha_cos or train.alpha_embedding):
            return None, _named(model.queries_keys_values(ids, count, train.relation_layer))
        hidden, related = model.body_and_queries_keys_values(ids, count, train.relation_layer)
        return hidden, _named(related)

    def with_live_states(self, batch: Batch) -> Batch:
        """The batch with the hidden states of a live teacher; unchanged without one."""
        if self.live is None:
            return batch
        count = None if batch.full else batch.token_count
        return replace(batch, hidden_states=self.live(batch.input_ids, count))

    def embedding(self, model: StudentModel, hidden: Tensor, batch: Batch, taught: Taught) -> Tensor:
        """The distances of a micro-batch's vectors from the teacher's, added up; ``hidden``: [B, L, D]."""
        assert taught.vectors is not None
        return embedding_distance(model.vectors(hidden, batch.token_count), taught.vectors)

    def taught(self, batch: Batch, dtype: torch.dtype, last_hidden: bool) -> Taught:
        """Replays only what the loss needs: last hidden states, relations, vectors of texts. With pooled
        positions nothing is replayed: the store holds the vectors."""
        if self.layout.positions == "pooled":
            return Taught(vectors=batch.embedding)
        relations, vectors = self.train.alpha_relation > 0, self.train.alpha_embedding > 0
        if not (last_hidden or relations or vectors):
            return Taught()
        assert self.replay is not None
        states, count = stored_states(batch, dtype), None if batch.full else batch.token_count
        if not (last_hidden or vectors):
            return Taught(None, _named(self.replay.queries_keys_values(states, count)))
        related = None
        if relations:
            last, found = self.replay.last_hidden_and_queries_keys_values(states, count)
            related = _named(found)
        else:
            last = self.replay.last_hidden(states, count)
        return Taught(
            picked(last, batch.recorded) if last_hidden else None,
            related,
            self._pooled(last, batch) if vectors else None,
        )

    def _pooled(self, last_hidden: Tensor, batch: Batch) -> Tensor:
        assert self.pooling is not None
        return pool(last_hidden, batch.token_count, self.pooling)

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
        masked_only = self.layout.positions == "masked"
        kl_masked = train.kl_positions == "masked" or masked_only
        student = picked(hidden, batch.positions)
        # If KL needs all positions, KL and CE are computed at all of them, otherwise at the masked ones
        # alone.
        # None means all rows. A store of masked positions has no others.
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
        """The soft target at ``temperature`` for all N positions, or for those that ``rows`` [n] selects."""
        if kind == "exact":
            assert self.replay is not None
            assert last_hidden is not None
            return ExactTarget(self.replay, last_hidden if rows is None else last_hidden[rows])
        return topk_target(self.layout, batch, temperature, rows) if kind == "topk" else None

    def relation(self, batch: Batch, student: dict[str, Tensor], taught: Taught, tokens: float) -> Tensor:
        """This micro-batch's share of R; see `relation_loss`."""
        assert taught.relations is not None
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


def embedding_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over texts of 1 - cos(s, t) + |s - t|^2 / |t|^2, of vectors [n, D]; float32 scalar.

    Texts are compared by the cosine. The squared distance, relative to the teacher's squared length, also
    pulls the student's vectors to the teacher's, so that queries of the student can be compared with
    documents of the teacher.
    """
    student, teacher = student.float(), teacher.float()
    angle = 1 - functional.cosine_similarity(student, teacher, dim=1)
    length = teacher.square().sum(1).clamp_min(1e-12)
    return (angle + (student - teacher).square().sum(1) / length).sum()


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
