"""How far the student is from its teacher on held-out text, and how well it predicts masked tokens.

Axes: N positions, V vocabulary, K top-k, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from offline_teacher.store.reader import Store
from student_train.engine import World
from student_train.objective import Objective, attention_mask, positions_of, teacher_hidden, topk_target
from student_train.order import SampleOrder, run_steps
from student_train.soft_targets import ExactTarget, TopkTarget
from student_train.stream import Batch, Stream
from student_train.vocabulary_kernels import NO_LABEL

if TYPE_CHECKING:
    from student_train.student import StudentModel

TEMPERATURES = (1.0, 2.0)
CHUNK_SIZE = {"cpu": 64, "cuda": 512}
"""Positions whose [chunk, V] logits exist at once: on a CPU few, for a dozen passes from the cache."""


@torch.no_grad()
def validate(
    model: StudentModel,
    objective: Objective,
    store: Store,
    world: World,
    advance: Callable[[int], None] = lambda sequences: None,
) -> dict[str, float]:
    """Over every sequence of replica 0, shared out over the ranks; the same numbers on all of them.
    ``advance`` is told how many sequences all ranks are further.

    ``kl_t1``, ``kl_t2``: KL(p_T || q_T) at T = 1 and 2, a mean over the recorded positions, where the store
    can say (top-k stores: with the tail as one bucket). ``mlm_loss``, ``mlm_accuracy``: at masked positions.
    ``teacher_mlm_loss``: the teacher's own there, where its hidden states are stored: what it can teach.
    ``agreement``: the share of masked positions where student and teacher have the same most likely token.
    ``cosine``: mean cosine similarity of the last hidden states, where stored.
    """
    plan, train = store.plan, objective.train
    exact = store.layout.hidden_states != "none"
    objective = dataclasses.replace(objective, layout=store.layout)
    batch_size = train.micro_batch_size * world.size
    sums = dict.fromkeys(
        (
            "positions", "masked", "kl_t1", "kl_t2", "cosine",
            "mlm_loss", "mlm_accuracy", "teacher_mlm_loss", "agreement",
        ),
        0.0,
    )  # fmt: skip
    temperatures = [t for t in TEMPERATURES if exact or t in store.layout.temperatures]
    was_training = model.training
    model.eval()
    order = SampleOrder(plan, seed=0, window_shards=1)
    stream = Stream(
        store,
        order,
        min(batch_size, plan.sequences),
        train.micro_batch_size,
        world.rank,
        world.size,
        0,
        run_steps(plan.sequences, min(batch_size, plan.sequences)),
        train.prefetch,
        world.device,
        samples=plan.sequences,
    )
    with stream:
        for step in stream:
            for batch in step.micro_batches:
                if batch.weight:
                    _add(sums, model, objective, batch.to(world.device), temperatures, exact)
            advance(len(step.sequence_ids))
    model.train(was_training)
    totals = dict(zip(sums, world.sum(list(sums.values())), strict=True))
    masked, positions = max(totals["masked"], 1.0), max(totals["positions"], 1.0)
    metrics = {name: totals[name] / masked for name in ("mlm_loss", "mlm_accuracy", "agreement")}
    metrics |= {f"kl_t{t:g}": totals[f"kl_t{t:g}"] / positions for t in temperatures}
    if exact:
        metrics["cosine"] = totals["cosine"] / positions
        metrics["teacher_mlm_loss"] = totals["teacher_mlm_loss"] / masked
    return metrics


def _add(
    sums: dict[str, float],
    model: StudentModel,
    objective: Objective,
    batch: Batch,
    temperatures: list[float],
    exact: bool,
) -> None:
    hidden = model.body(batch.input_ids, attention_mask(batch).long())
    at = positions_of(hidden, batch, objective.masked_only)
    z = model.head_transform(at.student_hidden)
    targets: dict[float, ExactTarget | TopkTarget] = {}
    if exact:
        teacher = teacher_hidden(batch, at.recorded, hidden.dtype)
        assert objective.head is not None
        targets = {t: ExactTarget(objective.head, teacher) for t in temperatures}
        similarity = functional.cosine_similarity(
            model.project(at.student_hidden).float(), teacher.float(), dim=1
        )
        sums["cosine"] += float(similarity.sum())
    else:
        targets = {t: topk_target(objective, batch, at.recorded, None, t) for t in temperatures}
    sums["positions"] += len(z)
    size = CHUNK_SIZE.get(z.device.type, 512)
    for start in range(0, len(z), size):
        rows = slice(start, min(start + size, len(z)))
        logits = functional.linear(z[rows], model.decoder_weight, model.decoder_bias).float()  # [n, V]
        labels = at.labels[rows]
        masked = labels != NO_LABEL
        best = logits.argmax(1)
        sums["masked"] += float(masked.sum())
        sums["mlm_loss"] += float(functional.cross_entropy(logits[masked], labels[masked], reduction="sum"))
        sums["mlm_accuracy"] += float((best == labels)[masked].sum())
        for number, (temperature, target) in enumerate(targets.items()):
            kl, teacher_best, log_p = _kl(target, rows, logits, temperature)
            sums[f"kl_t{temperature:g}"] += float(kl.sum())
            if number == 0:
                sums["agreement"] += float((best == teacher_best)[masked].sum())
                if log_p is not None:
                    sums["teacher_mlm_loss"] -= float(log_p[masked].gather(1, labels[masked][:, None]).sum())


def _kl(
    target: ExactTarget | TopkTarget, rows: slice, logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """KL [n] between teacher and student ``logits`` [n, V], the teacher's most likely token [n], and its log
    probabilities [n, V] where it says them all."""
    log_q = functional.log_softmax(logits / temperature, dim=1)
    if isinstance(target, ExactTarget):
        teacher = target.rows(rows).float()
        log_p = functional.log_softmax(teacher / temperature, dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(1), teacher.argmax(1), log_p
    ids, p, tail = target.rows(rows)
    log_q_ids = log_q.gather(1, ids)
    q_tail = torch.exp(torch.logsumexp(log_q.scatter(1, ids, -torch.inf), dim=1))
    kept = torch.special.xlogy(p, p) - p * log_q_ids
    rest = torch.special.xlogy(tail, tail) - torch.special.xlogy(tail, q_tail)
    return kept.sum(1) + rest, ids[:, 0], None
