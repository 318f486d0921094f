"""``evaluation``: tasks, fine-tuning, and what students must reach."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from infra.settings.sections.fields import grid_values, outcome, require, speed
from infra.settings.sections.task_settings import TaskSettings


@dataclass(frozen=True, kw_only=True)
class Require:
    """Limits that every student must meet, or the command ends with exit code 4. None: no limit. Shares are
    fractions: ``retention: 0.97`` requires at least 97 % of the teacher's macro score."""

    macro: float | None = speed(None)
    retention: float | None = speed(None)
    gap_closed: float | None = speed(None)
    gap_closed_best: float | None = speed(None)
    agreement: float | None = speed(None)
    """Smallest mean over tasks of the share of examples on which student and teacher give the same answer."""
    int8_loss: float | None = speed(None)
    """Largest loss of a task's score in int8, in points."""
    calibration_error: float | None = speed(None)
    """Largest expected calibration error of a task, as a fraction."""
    p50_ms: float | None = speed(None)
    """Largest median latency at batch size 1, in milliseconds."""
    megabytes: float | None = speed(None)
    """Largest size of the weights, in megabytes."""
    beats: Literal["random", "start"] | None = speed(None)
    """The reference whose macro score the student's must exceed in a paired test at the 5 % level."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The tasks on which teacher and students are fine-tuned and scored, and how."""

    tasks: tuple[str | TaskSettings, ...] = outcome(("CoLA", "SST-2", "MRPC", "STS-B", "RTE"))
    """Names of built-in tasks, paths of task files, or mappings of task settings (docs/tasks.md)."""
    data: str | None = speed(None)
    """Directory of official task files; None: the hub's ``glue``, ``imdb``, ``squad``."""
    seeds: tuple[int, ...] = outcome((0,))
    """Random seeds; every model is fine-tuned once per seed, and the scores are medians."""
    epochs: float | tuple[float, ...] = outcome(3.0)
    """A list is a grid: every value is tried, and the dev score chooses one. So it is for ``batch_size`` and
    ``learning_rate``."""
    batch_size: int | tuple[int, ...] = outcome(32)
    learning_rate: float | tuple[float, ...] = outcome(3e-5)
    max_steps: int | None = outcome(None)
    """Largest number of steps of a fine-tuning run, for large tasks on few cores."""
    max_length: int = outcome(128)
    dtype: Literal["bfloat16", "float32"] = outcome("float32")
    references: tuple[Literal["random", "start"], ...] = outcome(("random",))
    """Models with which students are compared, besides the teacher. ``random``: the student's architecture
    with random weights (row ``undistilled``). ``start``: the student before its training, with layers of the
    teacher."""
    models: dict[str, str] = speed(factory=dict)
    """Other models as further rows of the report: name -> directory, URL or hub name."""
    second_distillation: bool = outcome(False)
    """Also fine-tune each student, on every task, on labels and on the outputs of a fine-tuned teacher. These
    are the rows "<student> (D)"."""
    distillation_temperature: float = outcome(2.0)
    """Temperature of the second distillation."""
    latency_sentences: int = speed(0)
    """Number of sentences on which latency is measured; 0: all of STS-B dev."""
    latency_threads: int = speed(1)
    """Number of threads with which latency is measured."""
    elmo_reference: bool = speed(False)
    """Also time a network of ELMo's size with random weights, the slowest row of the latency table."""
    price_per_hour: float | None = speed(None)
    """Price per hour of the processor on which latency is measured, in any currency. If given, the report has
    the price of a million sentences."""
    watts: float | None = speed(None)
    """Power in watts of the processor on which latency is measured. If given, the report has the energy of a
    million sentences."""
    export_web: bool = speed(False)
    """Also write ``evaluation/web``, a page that runs the fine-tuned models in a browser (docs/web.md)."""
    require: Require | None = speed(None)
    """Limits that every student must meet."""
    workers: int = speed(1)
    """Number of parallel fine-tuning runs. If there are several, they are Ray tasks."""

    def __post_init__(self) -> None:
        self._check_rows()
        for name in ("price_per_hour", "watts"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}: must be > 0, not {value}")
        require(len(self.tasks) > 0, "tasks: names no task")
        require(len(self.seeds) > 0, "seeds: names no seed")
        for name in ("epochs", "learning_rate", "batch_size"):
            require(getattr(self, name) != (), f"{name}: the list is empty")
            for value in grid_values(getattr(self, name)):
                require(
                    value > 0, f"{name}: must be {'>= 1' if name == 'batch_size' else '> 0'}, not {value}"
                )
        for name in ("latency_threads", "workers"):
            require(getattr(self, name) >= 1, f"{name}: must be >= 1, not {getattr(self, name)}")
        require(
            self.max_steps is None or self.max_steps >= 1, f"max_steps: must be >= 1, not {self.max_steps}"
        )
        require(self.latency_sentences >= 0, f"latency_sentences: must be >= 0, not {self.latency_sentences}")
        temperature = self.distillation_temperature
        require(temperature > 0, f"distillation_temperature: must be > 0, not {temperature}")
        require(8 <= self.max_length <= 512, f"max_length: must be 8 to 512, not {self.max_length}")

    def _check_rows(self) -> None:
        require(
            len(set(self.references)) == len(self.references),
            f"references: {', '.join(self.references)} contains a name twice",
        )
        for name in self.models:
            require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is not None,
                f"models: a name is letters, digits, dots, dashes and underscores, not {name!r}",
            )
        reference = self.require.beats if self.require else None
        require(
            reference is None or reference in self.references,
            f"require: beats: {reference} must also be in evaluation.references",
        )
