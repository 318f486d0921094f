"""Stores of a tiny teacher, students that learn from them, and the same loss from the live teacher."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from transformers import BertForMaskedLM

from infra.settings.sections import Student, Train
from offline_teacher.models.replay import Replay
from offline_teacher.store.store import Store
from student_train.data.loss_needs import required_columns
from student_train.data.order import SampleOrder
from student_train.data.reading import open_stream
from student_train.data.stream import Step
from student_train.engine.world import World
from student_train.objectives.objective import TERMS, Objective
from student_train.student.model import StudentModel, build_student
from tests.benchmarks.live_reference import dense_inputs, live_loss

SEQUENCES = 20
RELATIONS = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0, "alpha_relation": 1.0}


class Alone(World):
    def sum(self, values: list[float]) -> list[float]:
        return values

    def raise_on_all_ranks(self, problem: str) -> None:
        assert not problem


ALONE = Alone(0, 1, torch.device("cpu"))


def train_of(**changes: Any) -> Train:
    settings = {"batch_size": SEQUENCES, "micro_batch_size": 5, "dtype": "float32", "compile": False}
    return Train(**{**settings, **changes})


def student_of(teacher: BertForMaskedLM, train: Train) -> StudentModel:
    student = Student(layers=(0,), init="random")
    model = build_student(student, train, teacher.config.to_dict(), None)
    with torch.no_grad():  # far from the teacher, so that every term counts
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def objective_of(store: Store, model: StudentModel, train: Train) -> Objective:
    layout, replay = store.layout, None
    if layout.hidden_states != "none":
        replay = Replay(store.teacher_config(), load_file(store.teacher_weights()), layout.replay_layers)
    return Objective(train, layout, replay)


def whole_step(store: Store, train: Train) -> Step:
    """Returns all sequences of the store as one optimiser step of several micro-batches."""
    order = SampleOrder(store.splits["train"].plan, 0, SEQUENCES, SEQUENCES, 2)
    with open_stream(store, "train", required_columns(train, store.layout), order, train, ALONE) as stream:
        return next(stream)


def from_store(
    objective: Objective, model: StudentModel, step: Step
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Returns terms and gradients of the step, added up over its micro-batches."""
    model.zero_grad()
    sums = dict.fromkeys(TERMS, 0.0)
    for batch in step.micro_batches:
        terms = objective(model, batch, step.tokens, step.masked)
        terms.total.backward()
        for name, value in zip(TERMS, terms.values(), strict=True):
            sums[name] += float(value.detach())
    return sums, gradients(model)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def live(
    teacher: BertForMaskedLM, model: StudentModel, step: Step, alphas: tuple[float, float, float]
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Returns terms and gradients by the dense formula on the whole batch at once."""
    model.zero_grad()
    parts = zip(*(dense_inputs(batch) for batch in step.micro_batches), strict=True)
    ids, mask, labels = (torch.cat(part) for part in parts)
    terms = live_loss(teacher, model.model, ids, mask, labels, alphas=alphas)
    terms["loss"].backward()
    return {name: float(value.detach()) for name, value in terms.items()}, gradients(model)


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Returns the norm of the gradients' difference, relative to the expected gradients."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return (difference / sum(float(b.square().sum()) for b in expected)) ** 0.5
