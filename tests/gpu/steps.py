"""A complete optimiser step, with torch's AdamW or with the trainer's engine."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from infra.settings.sections import Train
from student_train.data.collate import Batch
from student_train.objectives.objective import Objective
from student_train.student.model import StudentModel

NO_DEEPSPEED = "DeepSpeed is not installed here"


def deepspeed_there() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


class PlainStep:
    """Forward, backward and torch's AdamW on weights in the loss's dtype: a lower bound for a step's time."""

    def __init__(self, model: StudentModel, objective: Objective, train: Train, device: torch.device) -> None:
        self._model, self._objective, self._device = model.to(getattr(torch, train.dtype)), objective, device
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=device.type == "cuda")

    def __call__(self, batch: Batch) -> None:
        batch = batch.to(self._device)
        self._objective(self._model, batch, float(batch.tokens), float(batch.masked)).total.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class EngineStep:
    """The same step with the trainer's engine, which uses DeepSpeed."""

    def __init__(self, model: StudentModel, objective: Objective, train: Train, device: torch.device) -> None:
        from student_train.engine.engine import Engine

        self._model, self._objective, self._device = model, objective, device
        self._engine = Engine(model, train, world())

    def __call__(self, batch: Batch) -> None:
        batch = batch.to(self._device)
        terms = self._objective(self._model, batch, float(batch.tokens), float(batch.masked))
        self._engine.backward(terms.total, last=True)
        self._engine.step(5e-5)


_WORLD: list[Any] = []


def world() -> Any:
    """Returns the `World` that consists of this process; it is started at the first call."""
    from student_train.engine.world import start_world

    if not _WORLD:
        _WORLD.append(start_world())
    return _WORLD[0]


def close_world() -> None:
    while _WORLD:
        _WORLD.pop().close()
