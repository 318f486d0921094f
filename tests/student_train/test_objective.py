"""The loss of a micro-batch from the store, against the live teacher's dense formula on the same batch."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM

from infra.errors import UserError
from infra.sections import SOFT_TARGETS, Student, Train
from offline_teacher.store.reader import Store, open_store
from student_train.engine import World
from student_train.objective import TARGETS, Objective, attention_mask, columns_needed, soft_target_kind
from student_train.order import SampleOrder
from student_train.soft_targets import TeacherHead
from student_train.stream import Step, Stream
from student_train.student import StudentModel, build_student
from student_train.trainer import chained_digest, dropout_seed
from student_train.validation import validate
from tests.benchmarks.live_reference import NO_LABEL, live_loss
from tests.student_train.tiny_run import make_store, make_teacher


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertForMaskedLM, Path]:
    root = tmp_path_factory.mktemp("objective")
    return make_teacher(root / "teacher"), root


def store_of(made: tuple[BertForMaskedLM, Path], **kinds: Any) -> Store:
    teacher, root = made
    path = root / ("store-" + "-".join(f"{k}{v}" for k, v in kinds.items()))
    if not path.exists():
        make_store(path, teacher, root / "teacher", sequences=20, replicas=1, **kinds)
    return open_store(str(path))


def student_of(teacher: BertForMaskedLM) -> StudentModel:
    model = build_student(Student(layers=(0,), init="random"), teacher.config.to_dict(), None)
    with torch.no_grad():  # far from the teacher, so that every term counts
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def objective_of(store: Store, **changes: Any) -> Objective:
    train = Train(
        **{"batch_size": 20, "micro_batch_size": 5, "dtype": "float32", "compile": False, **changes}
    )
    return Objective(train, store.layout, TeacherHead.from_store(store.head()))


def whole_step(store: Store, train: Train) -> Step:
    columns = columns_needed(train, store.layout)
    with Stream(store, SampleOrder(store.plan, 0, 2), 20, 5, 0, 1, 0, 1, columns=columns) as stream:
        return next(stream)


def from_store(
    objective: Objective, model: StudentModel, step: Step
) -> tuple[list[float], list[torch.Tensor]]:
    """Terms and gradients of the step, added up over its micro-batches."""
    model.zero_grad()
    sums = [0.0] * 4
    for batch in step.micro_batches:
        terms = objective(model, batch, step.tokens, step.masked)
        terms.total.backward()
        values = (terms.total, terms.kl, terms.mlm, terms.cosine)
        sums = [old + float(new.detach()) for old, new in zip(sums, values, strict=True)]
    return sums, gradients(model)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def live(teacher: BertForMaskedLM, model: StudentModel, step: Step) -> tuple[list[float], list[torch.Tensor]]:
    """The same by the dense formula on the whole batch at once."""
    model.zero_grad()
    ids = torch.cat([batch.input_ids for batch in step.micro_batches])
    mask = torch.cat([attention_mask(batch) for batch in step.micro_batches]).long()
    labels = torch.full_like(ids, NO_LABEL)
    positions = torch.cat([batch.masked_positions for batch in step.micro_batches])
    labels.scatter_(1, positions, torch.cat([batch.masked_labels for batch in step.micro_batches]))
    terms = live_loss(teacher, model.model, ids, mask, labels)
    terms["loss"].backward()
    return [float(terms[name].detach()) for name in ("loss", "kl", "mlm", "cosine")], gradients(model)


@pytest.mark.parametrize(("hidden_states", "tolerance"), [("float16", 2e-3), ("int8", 3e-2)])
def test_exact_loss_and_gradient_are_the_live_teachers(
    made: tuple[BertForMaskedLM, Path], hidden_states: str, tolerance: float
) -> None:
    store = store_of(made, hidden_states=hidden_states)
    objective, model = objective_of(store), student_of(made[0])
    step = whole_step(store, objective.train)
    ours, our_gradients = from_store(objective, model, step)
    theirs, their_gradients = live(made[0], model, step)
    assert ours == pytest.approx(theirs, rel=tolerance)
    difference = sum(
        float((a - b).square().sum()) for a, b in zip(our_gradients, their_gradients, strict=True)
    )
    size = sum(float(b.square().sum()) for b in their_gradients)
    assert (difference / size) ** 0.5 < tolerance


def test_topk_loss_is_below_the_exact_one_and_close(made: tuple[BertForMaskedLM, Path]) -> None:
    """Merging the tail into one bucket can only lose divergence (data processing inequality)."""
    store, model = store_of(made), student_of(made[0])
    kl = []
    for kind in ("exact", "topk"):
        objective = objective_of(store, soft_targets=kind)
        kl.append(from_store(objective, model, whole_step(store, objective.train))[0][1])
    assert 0 < kl[1] < kl[0]


def test_masked_stores_give_the_masked_loss_of_full_ones(made: tuple[BertForMaskedLM, Path]) -> None:
    model = student_of(made[0])
    found = []
    for positions in ("all", "masked"):
        objective = objective_of(store_of(made, positions=positions), kl_positions="masked", alpha_cos=0.0)
        step = whole_step(store_of(made, positions=positions), objective.train)
        found.append(from_store(objective, model, step)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_auto_prefers_exact() -> None:
    train = Train(batch_size=8, micro_batch_size=8)
    from offline_teacher.store.schema import Layout

    layout = Layout(
        length=12,
        masked=2,
        vocab_size=96,
        top_k=8,
        temperatures=(1.0, 2.0),
        hidden_size=16,
        hidden_states="float16",
        positions="all",
    )
    assert soft_target_kind(train, layout) == "exact"
    no_hidden = dataclasses.replace(layout, hidden_states="none")
    assert soft_target_kind(dataclasses.replace(train, alpha_cos=0.0), no_hidden) == "topk"
    assert soft_target_kind(dataclasses.replace(train, alpha_ce=0.0), layout) is None
    with pytest.raises(UserError, match="hidden states"):
        soft_target_kind(train, no_hidden)


def test_validation_against_the_live_teacher(made: tuple[BertForMaskedLM, Path]) -> None:
    class Alone(World):
        def sum(self, values: list[float]) -> list[float]:
            return values

    teacher, _ = made
    store, model = store_of(made), student_of(teacher)
    objective = objective_of(store)
    metrics = validate(model, objective, store, Alone(0, 1, torch.device("cpu")))
    step = whole_step(store, objective.train)
    kl = {1.0: 0.0, 2.0: 0.0}
    masked = agree = right = teacher_loss = 0.0
    with torch.no_grad():
        for batch in step.micro_batches:
            mask = attention_mask(batch)
            s = model.model(input_ids=batch.input_ids, attention_mask=mask.long()).logits.double()
            t = teacher(input_ids=batch.input_ids, attention_mask=mask.long()).logits.double()
            for temperature in kl:
                p, q = (torch.log_softmax(x / temperature, -1) for x in (t, s))
                kl[temperature] += float((p.exp() * (p - q)).sum(-1)[mask].sum())
            rows = torch.arange(len(batch))[:, None]
            at = s[rows, batch.masked_positions].argmax(-1)
            agree += float((at == t[rows, batch.masked_positions].argmax(-1)).sum())
            right += float((at == batch.masked_labels).sum())
            known = torch.log_softmax(t[rows, batch.masked_positions], -1)
            teacher_loss -= float(known.gather(-1, batch.masked_labels[..., None].long()).sum())
            masked += at.numel()
    assert metrics["kl_t1"] == pytest.approx(kl[1.0] / step.tokens, rel=2e-3)
    assert metrics["kl_t2"] == pytest.approx(kl[2.0] / step.tokens, rel=2e-3)
    assert metrics["agreement"] == pytest.approx(agree / masked)
    assert metrics["mlm_accuracy"] == pytest.approx(right / masked)
    assert metrics["teacher_mlm_loss"] == pytest.approx(teacher_loss / masked, rel=2e-3)
    assert not model.training


def test_dropout_seeds_differ_by_seed_step_and_rank() -> None:
    seeds = {dropout_seed(seed, step, rank) for seed in range(3) for step in range(5) for rank in range(4)}
    assert len(seeds) == 60
    assert dropout_seed(1, 2, 3) == dropout_seed(1, 2, 3)


def test_chained_digest_sees_order_replica_and_history() -> None:
    import numpy as np

    zero, ids = np.zeros(3, np.int64), np.arange(3)
    first = chained_digest("", zero, ids)
    assert first == chained_digest("", zero, ids)
    others = [
        chained_digest("", zero, ids[::-1]),
        chained_digest("", zero + 1, ids),
        chained_digest(first, zero, ids),
    ]
    assert len({first, *others}) == 4


def test_every_kind_of_soft_target_has_its_needs_and_its_maker() -> None:
    kinds = set(typing.get_args(typing.get_type_hints(Train)["soft_targets"])) - {"auto"}
    assert kinds == set(SOFT_TARGETS) == set(TARGETS)
