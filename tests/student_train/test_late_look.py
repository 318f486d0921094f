"""On a GPU the host reads gradient norms only before logs and checkpoints; errors still name the right
step."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from infra.errors import UserError
from infra.settings.sections import Train
from student_train.engine import engine
from student_train.engine.master_step import MasterStep
from student_train.engine.world import World
from student_train.history import LogSums
from student_train.trainer import Trainer
from tests.student_train.tiny_run import command, logged, student, weights

SETTINGS = ("train.dtype=bfloat16", "train.log_every=4", "train.epochs=1", "train.checkpoint_every=0")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the optimiser's step and the loop work as on a GPU."""
    step = partial(MasterStep, sliced=False)
    monkeypatch.setattr(engine, "MasterStep", lambda wrapper, waits, sliced: step(wrapper, host_waits=False))
    monkeypatch.setattr(Trainer, "_reads_norms_now", lambda self: self._is_due(self.train_section.log_every))


def test_the_step_is_named_though_it_is_seen_later(
    alone: World, run_dir: Path, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, steps = Trainer._forward_backward, []

    def poisoned(self: Trainer, step: object, tokens: float, masked: float) -> torch.Tensor:
        terms = forward(self, step, tokens, masked)  # type: ignore[arg-type]
        steps.append(self.step)
        if self.step == 1:
            next(p.grad for p in self.model.parameters() if p.grad is not None).view(-1)[0] = float("nan")
        return terms

    monkeypatch.setattr(Trainer, "_forward_backward", poisoned)
    with pytest.raises(UserError, match=r"step 1: the gradient is not a finite number.*no checkpoint was"):
        command(run_dir, *SETTINGS)
    assert steps == [0, 1, 2, 3]
    assert not (student(run_dir) / "model").exists()


def test_a_run_without_faults_learns_the_same(
    alone: World, run_dir: Path, request: pytest.FixtureRequest
) -> None:
    assert command(run_dir, *SETTINGS) == 0
    found, lines = weights(run_dir), logged(run_dir)
    shutil.rmtree(student(run_dir))
    request.getfixturevalue("late")
    assert command(run_dir, *SETTINGS) == 0
    for name, tensor in weights(run_dir).items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-3, atol=1e-5)
    assert [line["step"] for line in logged(run_dir)] == [line["step"] for line in lines]
    for line, expected in zip(logged(run_dir), lines, strict=True):
        for name in ("loss", "gradient_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-3)


def test_the_norm_of_a_skipped_step_is_where_the_others_are() -> None:
    """The norms are stacked, which torch refuses across devices."""
    stub = SimpleNamespace(
        train_section=Train(dtype="float16"), _stage=0, loss_scale=8.0,
        world=World(0, 1, torch.device("meta")), _adamw=SimpleNamespace(param_groups=[]),
        _deepspeed=SimpleNamespace(step=lambda: None, was_step_applied=lambda: False),
    )  # fmt: skip
    assert engine.Engine.step(cast("engine.Engine", stub), 0.1).device == stub.world.device


def test_a_window_finds_the_first() -> None:
    sums = LogSums()
    assert sums.first_not_finite(0) is None
    for norm in (1.0, 2.0, float("inf"), float("nan"), 3.0):
        sums.add(torch.zeros(6), 1, torch.tensor(norm))
    assert sums.first_not_finite(15) == 12
    assert sums.gradient_norm == 3.0
    assert sums.first_not_finite(15) is None
