"""The jobs of an evaluation: one for each candidate, task and seed. A score file marks a job as done.

A score file ``<scores>/<candidate>/<task>/seed-<n>.json`` holds under ``key`` everything on which its numbers
depend, so a job runs again after a change of settings, dataset or model. ``predictions`` is the digest of the
file from which its numbers are computed (``evaluation.measures.predictions``). Without that file the job runs
again. Imports no torch, so that a finished evaluation is recognised in a fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evaluation.models import Candidate
from evaluation.tasks.catalogue import find_task
from evaluation.tasks.loading import load
from evaluation.tasks.task import Split, Task
from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Evaluation

MODEL = "model"
"""Folder of the fine-tuned model beside its score files, where it is kept."""


@dataclass(frozen=True)
class Lesson:
    """A fine-tuned teacher's outputs on the task's training set, see ``outputs_store``."""

    model: str
    """Directory of the fine-tuned teacher."""
    outputs: str
    """Directory of its outputs."""
    digest: str
    """Of everything that the outputs depend on."""


@dataclass(frozen=True)
class Job:
    """One run. Everything in it can be sent to another process."""

    candidate: Candidate
    digest: str
    """``candidate.digest()``, taken once for all jobs of a candidate."""
    task_name: str
    seed: int
    settings: Evaluation
    scores: str
    """Directory of all score files."""
    keep_model: bool = False
    predict_test: bool = False
    lesson: Lesson | None = None
    """The teacher's outputs of a second distillation; None for plain fine-tuning."""

    @property
    def task(self) -> Task:
        return find_task(self.task_name)

    @property
    def directory(self) -> str:
        return storage.join(self.scores, self.candidate.name, self.task_name)

    @property
    def path(self) -> str:
        return storage.join(self.directory, f"seed-{self.seed}.json")

    @property
    def predictions_path(self) -> str:
        return storage.join(self.directory, f"seed-{self.seed}.predictions.parquet")

    @property
    def model_directory(self) -> str:
        return storage.join(self.directory, f"seed-{self.seed}-{MODEL}")

    def key(self, splits: dict[str, Split]) -> dict[str, Any]:
        settings = self.settings
        more: dict[str, Any] = {}
        if self.lesson is not None:
            more["teacher"] = self.lesson.digest
            more["temperature"] = settings.distillation_temperature
        if self.task.kind == "regression":
            more["head_bias"] = "mean label"  # scores from before it began there are not these
        return more | {
            "model": self.digest,
            "random_weights": self.candidate.random_weights,
            "data": {part: split.digest() for part, split in splits.items()},
            "epochs": settings.epochs,
            "max_steps": settings.max_steps,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "max_length": self.task.max_length or settings.max_length,
            "dtype": settings.dtype,
        }


Work = tuple[Job, dict[str, Split]]
"""A job and the parts of its task."""


def load_splits(task: Task, data: str | None) -> dict[str, Split]:
    """The training and dev parts of a task."""
    return {part: load(task, part, data) for part in ("train", *task.dev_parts)}


def finished(job: Job, splits: dict[str, Split]) -> dict[str, Any] | None:
    """The score file of a job that is done under the same key, or None."""
    if not storage.exists(job.path):
        return None
    try:
        result = storage.read_json(job.path)
    except UserError:  # damaged: run again
        return None
    if not isinstance(result, dict) or result.get("key") != job.key(splits):
        return None
    predicted = job.predictions_path
    if not storage.exists(predicted) or storage.digest_file(predicted) != result.get("predictions"):
        return None
    folders = (job.model_directory, storage.join(job.directory, MODEL))
    if job.keep_model and not any(storage.list_names(folder) for folder in folders):
        return None
    if job.predict_test and "test_files" not in result:
        return None
    return result


def median_seed(results: list[dict[str, Any]]) -> int:
    """The seed whose score is the median; for an even number of seeds, the lower of the two middle ones."""
    ranked = sorted(results, key=lambda result: (result["score"], result["seed"]))
    return int(ranked[(len(ranked) - 1) // 2]["seed"])
