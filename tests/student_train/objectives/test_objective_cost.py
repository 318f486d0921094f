"""What a loss does not compute: positions that no term uses, unneeded layers; and no wait of the host."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM

from offline_teacher.models.replay import Replay
from offline_teacher.store.store import Store
from student_train.objectives import triple_loss
from student_train.objectives.kl_loss import exact_kernel, mlm_kernel
from student_train.objectives.soft_targets import ExactTarget
from student_train.student.model import StudentModel
from tests.student_train.objectives.from_stores import (
    RELATIONS,
    from_store,
    objective_of,
    student_of,
    train_of,
    whole_step,
)
from tests.waits import Waits


@pytest.mark.parametrize(
    ("changes", "exact", "mlm"),
    [
        ({}, "tokens", 0),
        ({"alpha_ce": 0.0}, 0, "masked"),
        ({"kl_positions": "masked"}, "masked", 0),
        ({"alpha_ce": 0.0, "alpha_mlm": 0.0}, 0, 0),
    ],
)
def test_positions_that_no_term_looks_at_cost_nothing(
    teacher: BertForMaskedLM,
    stores: typing.Callable[..., Store],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    exact: str | int,
    mlm: str | int,
) -> None:
    seen = {"exact": 0, "mlm": 0}

    def counted(name: str, kernel: Any) -> Any:
        def run(s: torch.Tensor, *arguments: Any) -> Any:
            seen[name] += len(s)
            return kernel(s, *arguments)

        return run

    monkeypatch.setitem(triple_loss.BLOCK_SIZE, "cpu", 1)
    monkeypatch.setattr(ExactTarget, "kernel", staticmethod(counted("exact", exact_kernel)))
    monkeypatch.setattr(triple_loss, "mlm_kernel", counted("mlm", mlm_kernel))
    store, train = stores(), train_of(**changes)
    model, step = student_of(teacher, train), whole_step(store, train)
    from_store(objective_of(store, model, train), model, step)
    counts = {"tokens": step.tokens, "masked": step.masked, 0: 0}
    assert seen == {"exact": counts[exact], "mlm": counts[mlm]}


@pytest.mark.parametrize(
    ("changes", "of_the_teacher", "of_the_student"),
    [
        (RELATIONS, "last_hidden", "body"),
        ({}, "queries_keys_values", "body_and_queries_keys_values"),
        ({"soft_targets": "topk", "alpha_cos": 0.0}, "last_hidden", "body_and_queries_keys_values"),
    ],
)
def test_no_more_is_run_than_the_loss_needs(
    teacher: BertForMaskedLM,
    stores: typing.Callable[..., Store],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    of_the_teacher: str,
    of_the_student: str,
) -> None:
    store, train = stores(replay_layers=1), train_of(**changes)
    model = student_of(teacher, train)
    monkeypatch.setattr(Replay, of_the_teacher, lambda *_: pytest.fail(f"{of_the_teacher} was replayed"))
    monkeypatch.setattr(StudentModel, of_the_student, lambda *_: pytest.fail(f"{of_the_student} was run"))
    monkeypatch.setattr(
        Replay, "last_hidden_and_queries_keys_values", lambda *_: pytest.fail("both were replayed")
    )
    terms, _ = from_store(objective_of(store, model, train), model, whole_step(store, train))
    assert terms["loss"] > 0


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alpha_ce": 0.0},
        {"kl_positions": "masked"},
        {"soft_targets": "topk", "alpha_cos": 0.0},
        RELATIONS,
        {"alpha_relation": 1.0},
    ],
)
def test_no_micro_batch_waits_for_its_host(
    teacher: BertForMaskedLM, stores: typing.Callable[..., Store], changes: dict[str, Any], full: bool
) -> None:
    """Forward, loss and gradient copy nothing to the host: positions and labels were computed in
    collation."""
    store, train = stores(replay_layers=1), train_of(micro_batch_size=1, **changes)
    model = student_of(teacher, train)  # without dropout, whose kernel on a CPU draws its seed on the host
    objective, step = objective_of(store, model, train), whole_step(store, train)
    batch = next(batch for batch in step.micro_batches if batch.no_padding == full)
    with Waits() as waits:
        objective(model, batch, step.tokens, step.masked).total.backward()
    assert waits.seen == []
