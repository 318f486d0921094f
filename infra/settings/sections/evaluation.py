"""``evaluation``: tasks, fine-tuning, and what students must reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infra.settings.sections import fields
from infra.settings.sections.fields import fingerprinted, require, unfingerprinted
from infra.settings.sections.task_settings import TaskSettings


@dataclass(frozen=True, kw_only=True)
class Require:
    """Limits that every student must meet, or the command ends with exit code 4. None: no limit. Shares are
    fractions: ``retention: 0.97`` requires at least 97 % of the teacher's macro score."""

    macro: float | None = unfingerprinted(None)
    retention: float | None = unfingerprinted(None)
    gap_closed: float | None = unfingerprinted(None)
    gap_closed_best: float | None = unfingerprinted(None)
    agreement: float | None = unfingerprinted(None)
    """Smallest mean over tasks of the share of examples on which student and teacher give the same answer."""
    int8_loss: float | None = unfingerprinted(None)
    """Largest loss of a task's score in int8, in points."""
    calibration_error: float | None = unfingerprinted(None)
    """Largest expected calibration error of a task, as a fraction."""
    p50_ms: float | None = unfingerprinted(None)
    """Largest median latency at batch size 1, in milliseconds."""
    megabytes: float | None = unfingerprinted(None)
    """Largest size of the weights, in megabytes."""
    beats: Literal["random", "start"] | None = unfingerprinted(None)
    """The reference whose macro score the student's must exceed in a paired test at the 5 % level."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The tasks on which teacher and students are fine-tuned and scored, and how."""

    tasks: tuple[str | TaskSettings, ...] = fingerprinted(("CoLA", "SST-2", "MRPC", "STS-B", "RTE"))
    """Names of built-in tasks, paths of task files, or mappings of task settings (docs/tasks.md)."""
    data: str | None = unfingerprinted(None)
    """Directory of official task files; None: the hub's ``glue``, ``imdb``, ``squad``."""
    seeds: tuple[int, ...] = fingerprinted((0,))
    """Random seeds; every model is fine-tuned once per seed, and the scores are medians."""
    epochs: float | tuple[float, ...] = fingerprinted(3.0)
    """A list is a grid: every value is tried, and the score on dev chooses one. ``batch_size`` and
    ``learning_rate`` may be lists, too."""
    batch_size: int | tuple[int, ...] = fingerprinted(32)
    learning_rate: float | tuple[float, ...] = fingerprinted(3e-5)
    max_steps: int | None = fingerprinted(None)
    """Largest number of steps of a fine-tuning run, for large tasks on few cores."""
    max_length: int = fingerprinted(128)
    dtype: Literal["bfloat16", "float32"] = fingerprinted("float32")
    references: tuple[Literal["random", "start"], ...] = fingerprinted(("random",))
    """Models with which students are compared, besides the teacher. ``random``: the student's architecture
    with random weights (row ``undistilled``). ``start``: the student before its training, with layers of the
    teacher."""
    models: dict[str, str] = unfingerprinted(factory=dict)
    """Other models as further rows of the report: name -> directory, URL or hub name."""
    second_distillation: bool = fingerprinted(False)
    """Also fine-tune each student, on every task, on labels and on the outputs of a fine-tuned teacher. These
    are the rows "<student> (D)"."""
    distillation_temperature: float = fingerprinted(2.0)
    """Temperature of the second distillation."""
    latency_sentences: int = unfingerprinted(0)
    """Number of sentences on which latency is measured; 0: all of STS-B dev."""
    latency_threads: int = unfingerprinted(1)
    """Number of threads with which latency is measured."""
    elmo_reference: bool = unfingerprinted(False)
    """Also time a network of ELMo's size with random weights, the slowest row of the latency table."""
    price_per_hour: float | None = unfingerprinted(None)
    """Price per hour of the processor on which latency is measured, in any currency. If given, the report has
    the price of a million sentences."""
    watts: float | None = unfingerprinted(None)
    """Power in watts of the processor on which latency is measured. If given, the report has the energy of a
    million sentences."""
    export_web: bool = unfingerprinted(False)
    """Also write ``evaluation/web``, a page that runs the fine-tuned models in a browser (docs/web.md)."""
    require: Require | None = unfingerprinted(None)
    """Limits that every student must meet."""
    workers: int = unfingerprinted(1)
    """Number of parallel fine-tuning runs. If there are several, they are Ray tasks."""

    def __post_init__(self) -> None:
        self._check_rows()
        fields.check_positive(
            self, "price_per_hour", "watts", "epochs", "learning_rate", "distillation_temperature"
        )
        fields.check_at_least(self, 1, "batch_size", "latency_threads", "workers", "max_steps")
        fields.check_at_least(self, 0, "latency_sentences", "seeds")
        require(len(self.tasks) > 0, "tasks: names no task; name one or more")
        require(len(self.seeds) > 0, "seeds: names no seed; name one or more")
        distinct = len(set(self.seeds)) == len(self.seeds)
        require(distinct, f"seeds: {', '.join(map(str, self.seeds))} names a seed twice; name it once")
        for name in ("epochs", "learning_rate", "batch_size"):
            require(getattr(self, name) != (), f"{name}: the list is empty; give a value")
        require(8 <= self.max_length <= 512, f"max_length: must be 8 to 512, not {self.max_length}")

    def _check_rows(self) -> None:
        names, distinct = ", ".join(self.references), len(set(self.references)) == len(self.references)
        require(distinct, f"references: {names} contains a name twice; name it once")
        for name in self.models:
            characters = "letters, digits, dots, dashes and underscores"
            require(fields.is_name(name), f"models: a name is {characters}, not {name!r}")
        reference = self.require.beats if self.require else None
        known = reference is None or reference in self.references
        require(known, f"require: beats: {reference} must also be in evaluation.references")
