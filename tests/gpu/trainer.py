"""Checks the trainer with its engine on this device, with a store that the worker of the pass makes."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from infra.settings.recipe import Recipe
from infra.settings.sections import Precision, Store, Train
from offline_teacher.store.store import open_store
from tests.gpu import stores
from tests.gpu.models import Size, random_teacher, student_and_loss, tiny_config
from tests.gpu.steps import NO_DEEPSPEED, deepspeed_there, world

STEPS = 6
PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")


class Stops:
    """Replaces the MLflow run, and asks the trainer to stop at one step."""

    run_id = None

    def __init__(self, at: int | None) -> None:
        self.at, self.trainer = at, None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step == self.at:
            self.trainer.stop_requested = True  # type: ignore[attr-defined]


def resume(device: torch.device, size: Size) -> dict[str, Any]:
    """Checks that six steps in one run are bit-equal to six steps with a stop and a resume in between. The
    runs use dropout, bfloat16 and float32, and the triple loss plus relations."""
    if not deepspeed_there():
        return {"skipped": NO_DEEPSPEED}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, deterministic():
        teacher = random_teacher(tiny_config())
        saved = stores.save_teacher(teacher, Path(scratch, "teacher"))
        making = stores.begin(
            Path(scratch), saved, str(device), dtype="float32", length=32, batch_size=16,
            store=Store(top_k=0, replay_layers=1), sequences={"train": 64, "validation": 16},
        )  # fmt: skip
        making.finish()
        for dtype in PRECISIONS:
            train = Train(
                dtype=dtype,
                alpha_relation=1.0, epochs=2.0, max_steps=STEPS, batch_size=16, micro_batch_size=8,
                log_every=1, checkpoint_every=1000,
            )  # fmt: skip
            recipe = dataclasses.replace(making.recipe, train=train)
            once = _trained(recipe, Path(scratch, f"once-{dtype}"), teacher, device, None)
            _trained(recipe, Path(scratch, f"resumed-{dtype}"), teacher, device, STEPS // 2)
            resumed = _trained(recipe, Path(scratch, f"resumed-{dtype}"), teacher, device, None)
            for name, weight in once["weights"].items():
                assert torch.equal(weight, resumed["weights"][name]), (
                    f"{dtype}: {name} differs after a resume"
                )
            results[dtype] = {name: once[name] for name in ("first", "last", "validation")}
            assert all(map(math.isfinite, once["validation"].values())), f"{dtype}: {once['validation']}"
    return results


def _trained(
    recipe: Recipe, directory: Path, teacher: Any, device: torch.device, stop: int | None
) -> dict[str, Any]:
    """Trains with a new student, engine and trainer until step ``stop`` or the end. Returns the weights, the
    first and the last loss, and the measures of validation."""
    from student_train.engine.engine import Engine
    from student_train.trainer import Stopped, Trainer

    run = dataclasses.replace(recipe, output=str(directory)).run("student")
    store = open_store(recipe.store_path)
    model, objective = student_and_loss(teacher, store.layout, run.student, run.train, device)
    engine, tracker = Engine(model, run.train, world()), Stops(stop)
    directory = Path(run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(run, world(), [store], model, objective, engine, tracker, {})
    tracker.trainer = trainer  # type: ignore[assignment]
    validation = {}
    try:
        validation = trainer.train()
        assert stop is None, "the trainer did not stop"
    except Stopped:
        assert trainer.step == stop, f"stopped at step {trainer.step} instead of {stop}"
    lines = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    weights = engine.gather()["weights"]
    return {"weights": weights, "first": losses[0], "last": losses[-1], "validation": validation}


@contextmanager
def deterministic() -> Iterator[None]:
    """A context with torch's deterministic kernels; operations without such a kernel only warn."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
