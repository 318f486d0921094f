"""A whole optimiser step, by the trainer's own engine where DeepSpeed is, else by torch's AdamW."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from infra.sections import Train
from student_train.data.collate import Batch
from student_train.objectives.objective import Objective
from student_train.student.model import StudentModel

NO_DEEPSPEED = "DeepSpeed is not installed here"


def deepspeed_there() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


class Stepper:
    """Trains ``model`` on one batch again and again; ``name`` says by what."""

    def __init__(self, model: StudentModel, objective: Objective, train: Train, device: torch.device) -> None:
        self._model, self._objective, self._device = model, objective, device
        self._engine: Any = None
        if deepspeed_there():
            from student_train.engine.engine import Engine

            self._engine, self.name = Engine(model, train, world()), "the trainer's engine"
            return
        model.to(getattr(torch, train.dtype))
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=device.type == "cuda")
        self.name = f"torch's AdamW: {NO_DEEPSPEED}"

    def __call__(self, batch: Batch) -> None:
        batch = batch.to(self._device)
        total = self._objective(self._model, batch, float(batch.tokens), float(batch.masked)).total
        if self._engine is not None:
            self._engine.backward(total, last=True)
            self._engine.step(5e-5)
            return
        total.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


_WORLD: list[Any] = []


def world() -> Any:
    """This process alone, as DeepSpeed sees it; started once."""
    from student_train.engine.world import start_world

    if not _WORLD:
        _WORLD.append(start_world())
    return _WORLD[0]


def close_world() -> None:
    while _WORLD:
        _WORLD.pop().close()
