"""The loss of a micro-batch: runs the student, replays the teacher's top layers, and adds up the terms.

    loss = alpha_ce T^2 KL(p_T || q_T) + alpha_mlm CE + alpha_cos (1 - cos) + alpha_relation R
           + alpha_embedding E

p_T, q_T: distributions of teacher and student at temperature T. R: `relation_loss`. E: `embedding_distance`.

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
from student_train.data.loss_needs import checked_soft_target_kind, needs_head, relation_heads
from student_train.objectives.relations import RELATIONS, relation_loss
from student_train.objectives.soft_targets import ExactTarget, SoftTarget, TopkTarget
from student_train.objectives.triple_loss import LossTerms, triple_loss

if TYPE_CHECKING:
    from offline_teacher.models.replay import Replay
    from offline_teacher.models.split import Lower
    from offline_teacher.store.schema import Layout
    from student_train.student.model import StudentModel

TERMS = ("loss", "kl", "mlm", "cosine", "relation", "embedding")
"""Names of the loss and its terms in history.jsonl."""


def stored_states(batch: Batch, dtype: torch.dtype) -> Tensor:
    """Returns the stored hidden states [B, P, D] in ``dtype``; int8 states are multiplied by their scale."""
    assert batch.hidden_states is not None
    if batch.hidden_scale is None:
        return batch.hidden_states.to(dtype)
    return (batch.hidden_states.float() * batch.hidden_scale[..., None]).to(dtype)


def select_positions(values: Tensor, index: Tensor | None) -> Tensor:
    """Flattens ``values`` [B, P, ...] to [B * P, ...] and returns the rows ``index``, int64 [N]; None: all
    rows."""
    flat = values.flatten(0, 1)
    return flat if index is None else flat[index]


@dataclass(frozen=True)
class TeacherOutputs:
    """The teacher's outputs for a micro-batch; a field is None if the loss does not need it."""

    last_hidden: Tensor | None = None  # [N, D]
    queries_keys_values: dict[str, Tensor] | None = None  # "queries", "keys", "values": each [B, L, D]
    embeddings: Tensor | None = None  # [B, D], one per text


@dataclass(frozen=True)
class Objective:
    """The loss of a recipe, as a function of a model and a micro-batch."""

    train: Train
    layout: Layout
    """Layout of the teacher's outputs; see `loss_needs.teacher_output_layout`."""
    replay: Replay | None
    """The teacher's top layers and head, in the student's dtype. None: the loss reads only stored top-k
    logits or stored embeddings."""
    live: Lower | None = None
    """Lower layers of a teacher that runs during training (a live teacher). None: hidden states are read from
    the store."""
    pooling: Pooling | None = None
    """How the teacher pools hidden states to a text's embedding; None without an embedding term."""

    def __call__(
        self,
        model: StudentModel,
        batch: Batch,
        token_total: float,
        masked_total: float,
        sequences: float = 1.0,
    ) -> LossTerms:
        """Returns this micro-batch's share of the terms; the shares of a step add up to its loss.

        ``token_total``, ``masked_total``, ``sequences``: numbers of tokens without padding, of masked
        tokens, and of sequences in the whole optimiser step. Only the embedding term needs ``sequences``.
        """
        train, batch = self.train, self.with_live_states(batch)
        hidden, student_qkv = self.student_outputs(model, batch)
        kind = checked_soft_target_kind(train, self.layout)
        teacher = self.teacher_outputs(
            batch, model.dtype, needs_last_hidden=bool(kind == "exact" or train.alpha_cos)
        )
        terms = LossTerms.zero(batch.input_ids.device)
        if hidden is not None and (needs_head(train) or train.alpha_cos):
            terms = self._position_terms(model, hidden, batch, teacher, kind, token_total, masked_total)
        if student_qkv is not None:
            relation = self.relation(batch, student_qkv, teacher, token_total)
            total = terms.total + train.alpha_relation * relation
            terms = replace(terms, total=total, relation=relation.detach())
        if hidden is not None and train.alpha_embedding:
            distance = self.embedding(model, hidden, batch, teacher) / sequences
            total = terms.total + train.alpha_embedding * distance
            terms = replace(terms, total=total, embedding=distance.detach())
        return terms

    def student_outputs(
        self, model: StudentModel, batch: Batch
    ) -> tuple[Tensor | None, dict[str, Tensor] | None]:
        """Returns the student's last hidden states [B, L, D] and its queries, keys and values; None for an
        output that the loss does not use."""
        train, ids, count = self.train, batch.input_ids, None if batch.no_padding else batch.token_count
        if not train.alpha_relation:
            return model.body(ids, count), None
        if not (needs_head(train) or train.alpha_cos or train.alpha_embedding):
            return None, _named(model.queries_keys_values(ids, count, train.relation_layer))
        hidden, qkv = model.body_and_queries_keys_values(ids, count, train.relation_layer)
        return hidden, _named(qkv)

    def with_live_states(self, batch: Batch) -> Batch:
        """Returns the batch with hidden states from the live teacher; without one, the batch itself."""
        if self.live is None:
            return batch
        count = None if batch.no_padding else batch.token_count
        return replace(batch, hidden_states=self.live(batch.input_ids, count))

    def embedding(self, model: StudentModel, hidden: Tensor, batch: Batch, teacher: TeacherOutputs) -> Tensor:
        """Returns `embedding_distance` of a micro-batch's texts; ``hidden``: the student's, [B, L, D]."""
        assert teacher.embeddings is not None
        return embedding_distance(model.text_embeddings(hidden, batch.token_count), teacher.embeddings)

    def teacher_outputs(self, batch: Batch, dtype: torch.dtype, *, needs_last_hidden: bool) -> TeacherOutputs:
        """Returns what the loss needs of the teacher, with as little replay as possible; a pooled store needs
        none. ``needs_last_hidden``: whether the loss needs last hidden states."""
        if self.layout.positions == "pooled":
            return TeacherOutputs(embeddings=batch.embedding)
        relations, embeddings = self.train.alpha_relation > 0, self.train.alpha_embedding > 0
        if not (needs_last_hidden or relations or embeddings):
            return TeacherOutputs()
        assert self.replay is not None
        states, count = stored_states(batch, dtype), None if batch.no_padding else batch.token_count
        if not (needs_last_hidden or embeddings):
            return TeacherOutputs(None, _named(self.replay.queries_keys_values(states, count, self._layer())))
        qkv = pooled = None
        if relations:
            last, last_qkv = self.replay.last_hidden_and_queries_keys_values(states, count, self._layer())
            qkv = _named(last_qkv)
        else:
            last = self.replay.last_hidden(states, count)
        if embeddings:
            assert self.pooling is not None
            pooled = pool(last, batch.token_count, self.pooling)
        recorded = select_positions(last, batch.recorded_positions) if needs_last_hidden else None
        return TeacherOutputs(recorded, qkv, pooled)

    def _position_terms(
        self,
        model: StudentModel,
        hidden: Tensor,
        batch: Batch,
        teacher: TeacherOutputs,
        kind: str | None,
        token_total: float,
        masked_total: float,
    ) -> LossTerms:
        """Returns the terms that compare single positions: KL, masked LM, cosine."""
        train = self.train
        store_masked_only = self.layout.positions == "masked"
        kl_masked = train.kl_positions == "masked" or store_masked_only
        student_hidden = select_positions(hidden, batch.positions)
        # Which of the N positions get KL and CE. None, all of them: KL needs all, or the store has masked
        # positions only. Otherwise: the masked ones.
        rows = None if store_masked_only or (kind and not kl_masked) else batch.masked_in_positions
        vocabulary = needs_head(train)
        vocabulary_hidden = student_hidden if rows is None else student_hidden[rows]
        return triple_loss(
            model.head_transform(vocabulary_hidden) if vocabulary else vocabulary_hidden,
            model.decoder_weight if vocabulary else None,
            model.decoder_bias if vocabulary else None,
            self.target(batch, teacher.last_hidden, train.temperature, kind, rows),
            batch.labels if rows is None else batch.labels[rows],
            model.project(student_hidden),
            teacher.last_hidden if train.alpha_cos else None,
            temperature=train.temperature, alpha_ce=train.alpha_ce, alpha_mlm=train.alpha_mlm,
            alpha_cos=train.alpha_cos, tokens=masked_total if store_masked_only else token_total,
            masked=masked_total, kl_tokens=masked_total if kl_masked else token_total, compile=train.compile,
        )  # fmt: skip

    def target(
        self,
        batch: Batch,
        last_hidden: Tensor | None,
        temperature: float,
        kind: str | None,
        rows: Tensor | None = None,
    ) -> SoftTarget | None:
        """Returns the soft target of the N positions, or of their ``rows`` [n]; None if ``kind`` is None."""
        if kind == "exact":
            assert self.replay is not None
            assert last_hidden is not None
            return ExactTarget(self.replay, last_hidden if rows is None else last_hidden[rows])
        return topk_target(self.layout, batch, temperature, rows) if kind == "topk" else None

    def _layer(self) -> int:
        """Returns the index among the replayed layers (0 = lowest) of the teacher layer whose relations are
        compared; the setting counts from the top and is negative."""
        layer = self.train.relation_teacher_layer
        return 0 if layer is None else self.layout.replay_layers + layer

    def relation(
        self, batch: Batch, student_qkv: dict[str, Tensor], teacher: TeacherOutputs, token_total: float
    ) -> Tensor:
        """Returns this micro-batch's share of R; see `relation_loss`."""
        qkv, train, count = teacher.queries_keys_values, self.train, batch.token_count
        assert qkv is not None
        widths = qkv["queries"].shape[-1], student_qkv["queries"].shape[-1]
        heads = relation_heads(*widths, train.relation_heads)
        weights = dict(zip(RELATIONS, train.relation_weights, strict=True))
        return relation_loss(
            student_qkv, qkv, count, heads, token_total, weights, batch.no_padding, train.compile
        )


def embedding_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the sum over texts of 1 - cos(s, t) + |s - t|^2 / |t|^2, of embeddings [n, D]; float32 scalar.

    Texts are later compared by the cosine. The second part makes the student's embeddings also equal the
    teacher's, so that queries embedded by the student can be compared with documents embedded by the teacher.
    """
    student, teacher = student.float(), teacher.float()
    angle = 1 - functional.cosine_similarity(student, teacher, dim=1)
    squared_norm = teacher.square().sum(1).clamp_min(1e-12)
    return (angle + (student - teacher).square().sum(1) / squared_norm).sum()


def _named(queries_keys_values: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Returns the three tensors as a dict with the keys queries, keys, values."""
    return dict(zip(RELATIONS, queries_keys_values, strict=True))


def topk_target(layout: Layout, batch: Batch, temperature: float, rows: Tensor | None = None) -> TopkTarget:
    """Returns the top-k soft target of the N positions, or of their ``rows``, at one of the store's
    temperatures."""
    assert batch.topk_ids is not None
    assert batch.topk_logits is not None
    assert batch.logsumexp is not None
    columns = (batch.topk_ids, batch.topk_logits, batch.logsumexp)
    ids, logits, logsumexp = (select_positions(column, batch.recorded_positions) for column in columns)
    if rows is not None:
        ids, logits, logsumexp = ids[rows], logits[rows], logsumexp[rows]
    return TopkTarget(ids, logits, logsumexp[:, layout.temperatures.index(temperature)], temperature)
