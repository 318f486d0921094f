"""Measures a student on held-out text: its distance from the teacher, and its masked-LM predictions.

Axes: n positions of a chunk, N of a micro-batch, V vocabulary, K top-k, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from infra.settings.sections import Train
from student_train.data.collate import NO_LABEL, Batch
from student_train.data.loss_needs import needs_head
from student_train.data.order import SampleOrder
from student_train.data.reading import open_stream
from student_train.objectives.objective import Objective, select_positions, topk_target
from student_train.objectives.soft_targets import ExactTarget

if TYPE_CHECKING:
    from offline_teacher.store.store import Store
    from student_train.engine.world import World
    from student_train.student.model import StudentModel

TEMPERATURES = (1.0, 2.0)
"""Temperatures of the measures ``kl_t1`` and ``kl_t2``."""
CHUNK_SIZE = {"cpu": 64, "cuda": 512}
"""Positions whose logits [chunk, V] exist at once; on a CPU few, so that they stay in its cache."""
_SUMS = (  # from which the measures are computed
    *("positions", "tokens", "masked", "kl_t1", "kl_t2", "mlm_loss", "mlm_accuracy", "teacher_mlm_loss"),
    *("agreement", "cosine", "relation", "sequences", "embedding"),
)


@torch.no_grad()
def validate(
    model: StudentModel,
    objective: Objective,
    store: Store,
    world: World,
    train: Train,
    advance: Callable[[int], None] = lambda sequences: None,
) -> dict[str, float]:
    """Returns the measures of the whole held-out split, the same on every rank. All ranks call it.

    The ranks share the sequences. ``advance`` gets the number of sequences that all ranks together have
    finished since its last call. Measures of loss terms that the student was not trained with are left out.

    - ``kl_t1``, ``kl_t2``: KL(p_T || q_T) in nats at T = 1 and 2, mean over recorded positions. With top-k
      logits, at the store's temperatures only, and with all other tokens as one bucket.
    - ``mlm_loss``, ``mlm_accuracy``: cross-entropy in nats and accuracy at masked positions.
    - ``teacher_mlm_loss``: the teacher's cross-entropy at masked positions, if the store has hidden states.
    - ``agreement``: share of masked positions at which student and teacher have the same most likely token.
    - ``cosine``: mean cosine similarity of the last hidden states.
    - ``relation``: R of `relation_loss`. ``embedding``: mean `embedding_distance` per text.
    """
    measures = _Measures(model, objective)
    sums = dict.fromkeys(_SUMS, 0.0)
    was_training = model.training
    model.eval()
    plan = store.splits["validation"].plan
    batch_size = train.micro_batch_size * world.size
    order = SampleOrder(plan, 0, batch_size, plan.samples, window_batches=1)
    with open_stream(store, "validation", measures.columns, order, train, world) as stream:
        while (step := world.on_all_ranks(lambda: next(stream, None))) is not None:
            for batch in step.micro_batches:
                if batch.weight:
                    measures.add(sums, batch.to(world.device))
            advance(len(step.locations))
    model.train(was_training)
    totals = dict(zip(sums, world.sum(list(sums.values())), strict=True))
    return measures.means(totals)


class _Measures:
    """Decides which measures a student has on a store, and computes them. The argument ``sums`` maps the
    names in `_SUMS` to this rank's sums so far."""

    def __init__(self, model: StudentModel, objective: Objective) -> None:
        self.model, self.objective, self.layout = model, objective, objective.layout
        train = objective.train
        self.has_hidden = self.layout.hidden_states != "none"
        self.vocabulary = needs_head(train)
        self.cosine = self.has_hidden and train.alpha_cos > 0
        self.relation, self.embedding = train.alpha_relation > 0, train.alpha_embedding > 0
        temperatures = TEMPERATURES if self.has_hidden else self.layout.temperatures
        self.temperatures = [t for t in TEMPERATURES if t in temperatures] if self.vocabulary else []
        self.columns = ["topk_ids", "topk_logits", "logsumexp"]
        if self.has_hidden:
            self.columns = ["hidden_states"] + ["hidden_scale"] * (self.layout.hidden_states == "int8")
        if self.layout.positions == "pooled":
            self.columns = ["embedding"]
        if objective.live is not None:
            self.columns = []

    def add(self, sums: dict[str, float], batch: Batch) -> None:
        """Adds one micro-batch to ``sums``."""
        objective, model = self.objective, self.model
        batch = objective.with_live_states(batch)
        hidden, student_qkv = objective.student_outputs(model, batch)
        needs_hidden = self.has_hidden and (self.vocabulary or self.cosine)
        teacher = objective.teacher_outputs(batch, model.dtype, needs_last_hidden=needs_hidden)
        sums["tokens"] += batch.tokens
        if student_qkv is not None:
            sums["relation"] += float(objective.relation(batch, student_qkv, teacher, token_total=1.0))
        if hidden is None:
            return
        if self.embedding:
            sums["sequences"] += len(batch)
            sums["embedding"] += float(objective.embedding(model, hidden, batch, teacher))
        student = select_positions(hidden, batch.positions)
        sums["positions"] += len(student)
        if self.cosine:
            assert teacher.last_hidden is not None
            pair = model.project(student).float(), teacher.last_hidden.float()
            sums["cosine"] += float(functional.cosine_similarity(*pair, dim=1).sum())
        if self.vocabulary:
            self._add_vocabulary(sums, model.head_transform(student), batch, teacher.last_hidden)

    def _add_vocabulary(
        self, sums: dict[str, float], z: Tensor, batch: Batch, teacher_hidden: Tensor | None
    ) -> None:
        """Adds N positions to the measures over the vocabulary. ``z`` [N, D]: the student's decoder input.
        ``teacher_hidden`` [N, D]: None if the store has top-k logits."""
        size = CHUNK_SIZE.get(z.device.type, 512)
        for start in range(0, len(z), size):
            rows = slice(start, min(start + size, len(z)))
            logits = functional.linear(z[rows], self.model.decoder_weight, self.model.decoder_bias).float()
            labels = batch.labels[rows]
            masked = labels != NO_LABEL
            sums["masked"] += float(masked.sum())
            sums["mlm_loss"] += _summed_loss(logits, labels)
            best = logits.argmax(1)
            sums["mlm_accuracy"] += float((best == labels)[masked].sum())
            if teacher_hidden is None:
                teacher_best = self._add_topk(sums, logits, batch, rows)
            else:
                teacher_best = self._add_exact(sums, logits, labels, teacher_hidden[rows])
            if teacher_best is not None:
                sums["agreement"] += float((best == teacher_best)[masked].sum())

    def _add_exact(
        self, sums: dict[str, float], logits: Tensor, labels: Tensor, teacher_hidden: Tensor
    ) -> Tensor:
        """Adds measures against the teacher's full logits. Returns the teacher's most likely tokens [n]."""
        assert self.objective.replay is not None
        teacher = ExactTarget(self.objective.replay, teacher_hidden).logits(slice(None)).float()
        sums["teacher_mlm_loss"] += _summed_loss(teacher, labels)
        for t in self.temperatures:
            log_p, log_q = functional.log_softmax(teacher / t, 1), functional.log_softmax(logits / t, 1)
            sums[f"kl_t{t:g}"] += float((log_p.exp() * (log_p - log_q)).sum())
        return teacher.argmax(1)

    def _add_topk(self, sums: dict[str, float], logits: Tensor, batch: Batch, rows: slice) -> Tensor | None:
        """Adds the measures against the stored top-k logits. Returns the teacher's most likely tokens [n];
        None if the store has none of the `TEMPERATURES`."""
        best = None
        for t in self.temperatures:
            ids, p, tail = topk_target(self.layout, batch, t).probabilities(rows)
            sums[f"kl_t{t:g}"] += float(_topk_kl(logits / t, ids, p, tail).sum())
            best = ids[:, 0]
        return best

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """Returns the measures, given the sums over all ranks."""
        positions = max(totals["positions"], 1.0)
        metrics = {f"kl_t{t:g}": totals[f"kl_t{t:g}"] / positions for t in self.temperatures}
        if self.vocabulary and totals["masked"]:
            names = ["mlm_loss", "mlm_accuracy"] + ["teacher_mlm_loss"] * self.has_hidden
            names += ["agreement"] * bool(self.temperatures)
            metrics |= {name: totals[name] / totals["masked"] for name in names}
        if self.cosine:
            metrics["cosine"] = totals["cosine"] / positions
        if self.embedding:
            metrics["embedding"] = totals["embedding"] / max(totals["sequences"], 1.0)
        if self.relation:
            metrics["relation"] = totals["relation"] / max(totals["tokens"], 1.0)
        return metrics


def _summed_loss(logits: Tensor, labels: Tensor) -> float:
    """Returns the cross-entropy in nats of logits [n, V], summed over the positions that have a label."""
    return float(functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum"))


def _topk_kl(scaled: Tensor, ids: Tensor, p: Tensor, tail: Tensor) -> Tensor:
    """Returns KL [n] in nats between a top-k target and a student. ``scaled`` [n, V]: the student's logits
    divided by T. For ``ids``, ``p``, ``tail`` see `TopkTarget.probabilities`."""
    log_q = functional.log_softmax(scaled, dim=1)
    log_q_tail = torch.logsumexp(log_q.scatter(1, ids, -torch.inf), dim=1)
    top = torch.special.xlogy(p, p) - p * log_q.gather(1, ids)
    outside = torch.special.xlogy(tail, tail) - tail * log_q_tail
    return top.sum(1) + outside.where(log_q_tail.isfinite(), 0.0)  # with K = V, no token is outside
