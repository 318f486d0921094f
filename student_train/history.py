"""The log of a training run: sums over steps, written to history.jsonl and MLflow."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from infra import console
from infra.files import storage
from infra.files.os_errors import reporting_os_errors
from student_train.objectives.objective import TERMS


class Tracker(Protocol):
    """The part of ``infra.tracking.run.Run`` that the training loop uses."""

    @property
    def run_id(self) -> str | None: ...
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...


@dataclass
class LogSums:
    """Sums over the steps since the last logged step, on this rank."""

    seconds: float = 0.0
    """Seconds spent on the steps, without checkpoints and validation."""
    waited: float = 0.0
    """Part of ``seconds`` in which this rank waited for its stream of batches."""
    tokens: int = 0
    """Number of tokens without padding, over all ranks."""
    steps: int = 0
    """Number of steps."""
    terms: torch.Tensor = field(default_factory=lambda: torch.zeros(len(TERMS), dtype=torch.float64))
    """This rank's share of each of `TERMS`, summed over the steps; on the device of the loss."""

    gradient_norm: float = math.nan
    """Gradient norm of the last step whose norm the host has read; NaN before the first."""
    norms: list[torch.Tensor] = field(default_factory=list)
    """Gradient norms of the steps after it, scalars that the host has not read."""

    def add(self, terms: torch.Tensor, tokens: int, norm: torch.Tensor) -> None:
        """Adds one step: this rank's `TERMS`, tokens over all ranks, and the gradient norm."""
        self.terms = self.terms.to(terms.device) + terms
        self.tokens += tokens
        self.steps += 1
        self.norms.append(norm)

    def first_not_finite(self, step: int) -> int | None:
        """Reads ``norms``. Returns the first step whose norm is not finite; None if there is none. ``step``:
        number of steps done, so that the last norm is that of step ``step - 1``."""
        if not self.norms:
            return None
        values, self.norms = torch.stack(self.norms).tolist(), []
        self.gradient_norm = values[-1]
        first = step - len(values)
        return next((at for at, norm in enumerate(values, first) if not math.isfinite(norm)), None)


class History:
    """The lines of history.jsonl: one JSON object per record. MLflow gets the same numbers."""

    def __init__(self, path: str, tracker: Tracker, writes: bool) -> None:
        """``writes``: True on rank 0; on other ranks ``record`` and ``trim`` do nothing."""
        self.path, self._tracker, self._writes = path, tracker, writes

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Appends a line with ``step``, the number of steps done, and ``values``."""
        if not self._writes:
            return
        with reporting_os_errors(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, float)}
        self._tracker.log_metrics(numbers, step)

    def last_losses(self) -> dict[str, float]:
        """Returns each of `TERMS` at the last logged step, even if an earlier process logged it."""
        if not os.path.exists(self.path):
            return {}
        lines = [json.loads(line) for line in storage.read_bytes(self.path).decode().splitlines()]
        logged = [line for line in lines if "loss" in line]
        return {name: logged[-1][name] for name in TERMS if logged and name in logged[-1]}

    def trim(self, step: int) -> None:
        """Removes lines after ``step``, from which a run resumes, and lines that a crash left incomplete."""
        if not self._writes or not os.path.exists(self.path):
            return
        kept = []
        for line in storage.read_bytes(self.path).decode(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        storage.publish_bytes(self.path, "".join(f"{line}\n" for line in kept).encode())


@contextmanager
def progress(shown: bool, total: int, unit: str, description: str, done: int = 0) -> Iterator[Any]:
    """Yields a progress bar of ``total`` units, of which ``done`` are finished; silent unless ``shown``."""
    if shown:
        with console.progress(total, unit, description, done) as bar:
            yield bar
    else:
        yield _SilentBar()


class _SilentBar:
    def advance(self, count: int = 1) -> None: ...
    def note(self, text: str) -> None: ...
