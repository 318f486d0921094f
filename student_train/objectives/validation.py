"""Validation on held-out text: distances between student and teacher, and masked-token prediction.

Axes: N positions, V vocabulary, K top-k, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from infra.errors import UserError
from infra.settings.sections import Train
from student_train.data.collate import NO_LABEL, Batch
from student_train.data.order import SampleOrder
from student_train.data.reading import open_stream
from student_train.data.stream import Step, Stream
from student_train.objectives.objective import Objective, picked, topk_target
from student_train.objectives.soft_targets import ExactTarget
from student_train.student.model import needs_head

if TYPE_CHECKING:
    from offline_teacher.store.reader import Store
    from student_train.engine.world import World
    from student_train.student.model import StudentModel

TEMPERATURES = (1.0, 2.0)
CHUNK_SIZE = {"cpu": 64, "cuda": 512}
"""Positions whose [chunk, V] logits exist at once: on a CPU few, for a dozen passes from the cache."""
SUMS = (
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
    """Measures over all sequences of the held-out split, which the ranks share; every rank gets the same
    numbers.

    ``advance`` gets the number of sequences that all ranks have finished since its last call. Measures for
    which the student was not trained are left out: a student without a head has no measure over the
    vocabulary.

    ``kl_t1``, ``kl_t2``: KL(p_T || q_T) at T = 1 and 2, a mean over the recorded positions, if the store
    holds what it needs (top-k stores: with the tail as one bucket). ``mlm_loss``, ``mlm_accuracy``: at masked
    positions. ``teacher_mlm_loss``: the teacher's own masked-LM loss, where the store has hidden states.
    ``agreement``: the share of masked positions where student and teacher have the same most likely token.
    ``cosine``: mean cosine similarity of the last hidden states. ``relation``: the mean over relations.
    ``embedding``: the mean distance of the vectors of texts.
    """
    measures = _Measures(model, objective)
    sums = dict.fromkeys(SUMS, 0.0)
    was_training = model.training
    model.eval()
    plan = store.splits["validation"].plan
    batch_size = train.micro_batch_size * world.size
    order = SampleOrder(plan, 0, batch_size, plan.samples, window_batches=1)
    with open_stream(store, "validation", measures.columns, order, train, world) as stream:
        for step in _agreed(stream, world):
            for batch in step.micro_batches:
                if batch.weight:
                    measures.add(sums, batch.to(world.device))
            advance(len(step.places))
    model.train(was_training)
    totals = dict(zip(sums, world.sum(list(sums.values())), strict=True))
    return measures.means(totals)


def _agreed(stream: Stream, world: World) -> Iterator[Step]:
    """The steps of the stream; what it raises on one rank is raised on all of them."""
    while True:
        step, problem = None, ""
        try:
            step = next(stream, None)
        except UserError as error:
            problem = str(error)
        world.raise_first(problem)
        if step is None:
            return
        yield step


class _Measures:
    """Which measures a student has on a store, and their sums over micro-batches."""

    def __init__(self, model: StudentModel, objective: Objective) -> None:
        self.model, self.objective, self.layout = model, objective, objective.layout
        train = objective.train
        self.exact = self.layout.hidden_states != "none"
        self.vocabulary = needs_head(train)
        self.cosine = self.exact and train.alpha_cos > 0
        self.relation, self.embedding = train.alpha_relation > 0, train.alpha_embedding > 0
        temperatures = TEMPERATURES if self.exact else self.layout.temperatures
        self.temperatures = [t for t in TEMPERATURES if t in temperatures] if self.vocabulary else []
        self.columns = ["topk_ids", "topk_logits", "logsumexp"]
        if self.exact:
            self.columns = ["hidden_states"] + ["hidden_scale"] * (self.layout.hidden_states == "int8")
        if self.layout.positions == "pooled":
            self.columns = ["embedding"]
        if objective.live is not None:
            self.columns = []

    def add(self, sums: dict[str, float], batch: Batch) -> None:
        """Adds the sums of one micro-batch."""
        objective, model = self.objective, self.model
        batch = objective.with_live_states(batch)
        hidden, related = objective.student(model, batch)
        taught = objective.taught(batch, model.dtype, self.exact and (self.vocabulary or self.cosine))
        sums["tokens"] += batch.tokens
        if related is not None:
            sums["relation"] += float(objective.relation(batch, related, taught, tokens=1.0))
        if hidden is None:
            return
        if self.embedding:
            sums["sequences"] += len(batch)
            sums["embedding"] += float(objective.embedding(model, hidden, batch, taught))
        student = picked(hidden, batch.positions)
        sums["positions"] += len(student)
        if self.cosine:
            assert taught.last_hidden is not None
            similarity = functional.cosine_similarity(
                model.project(student).float(), taught.last_hidden.float(), dim=1
            )
            sums["cosine"] += float(similarity.sum())
        if self.vocabulary:
            self._add_vocabulary(sums, model.head_transform(student), batch, taught.last_hidden)

    def _add_vocabulary(
        self, sums: dict[str, float], z: Tensor, batch: Batch, teacher_hidden: Tensor | None
    ) -> None:
        """The measures over the vocabulary of N positions; ``teacher_hidden`` [N, D] where it is stored."""
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
            teacher_best = (
                self._add_topk(sums, logits, batch, rows)
                if teacher_hidden is None
                else self._add_exact(sums, logits, labels, teacher_hidden[rows])
            )
            if teacher_best is not None:
                sums["agreement"] += float((best == teacher_best)[masked].sum())

    def _add_exact(
        self, sums: dict[str, float], logits: Tensor, labels: Tensor, teacher_hidden: Tensor
    ) -> Tensor:
        """Adds the measures against the teacher's own logits; returns the teacher's most likely tokens
        [n]."""
        assert self.objective.replay is not None
        teacher = ExactTarget(self.objective.replay, teacher_hidden).rows(slice(None)).float()
        sums["teacher_mlm_loss"] += _summed_loss(teacher, labels)
        for t in self.temperatures:
            log_p, log_q = functional.log_softmax(teacher / t, 1), functional.log_softmax(logits / t, 1)
            sums[f"kl_t{t:g}"] += float((log_p.exp() * (log_p - log_q)).sum())
        return teacher.argmax(1)

    def _add_topk(self, sums: dict[str, float], logits: Tensor, batch: Batch, rows: slice) -> Tensor | None:
        """Adds the measures against the stored top k; returns the teacher's most likely tokens [n]."""
        best = None
        for t in self.temperatures:
            ids, p, tail = topk_target(self.layout, batch, t).rows(rows)
            sums[f"kl_t{t:g}"] += float(_topk_kl(logits / t, ids, p, tail).sum())
            best = ids[:, 0]
        return best

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """The measures of sums over all ranks."""
        positions = max(totals["positions"], 1.0)
        metrics = {f"kl_t{t:g}": totals[f"kl_t{t:g}"] / positions for t in self.temperatures}
        if self.vocabulary and totals["masked"]:
            names = ["mlm_loss", "mlm_accuracy"] + ["teacher_mlm_loss"] * self.exact
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
    """Cross-entropy of logits [n, V] over the positions that have a label, in nats, added up."""
    return float(functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum"))


def _topk_kl(scaled: Tensor, ids: Tensor, p: Tensor, tail: Tensor) -> Tensor:
    """KL [n] of a top-k target from the student's logits over T [n, V]; the tail is one bucket."""
    log_q = functional.log_softmax(scaled, dim=1)
    log_q_tail = torch.logsumexp(log_q.scatter(1, ids, -torch.inf), dim=1)
    kept = torch.special.xlogy(p, p) - p * log_q.gather(1, ids)
    rest = torch.special.xlogy(tail, tail) - tail * log_q_tail
    return kept.sum(1) + rest.where(log_q_tail.isfinite(), 0.0)  # no token is left where K = V
