"""The jobs of an evaluation: one fine-tuning run per candidate, task, point of the grid, and seed.

A job is finished when it has a score file: ``<scores>/<candidate>/<task>/seed-<n>.json``, or, if the task has
a grid, ``<scores>/<candidate>/<task>/<grid folder>/seed-<n>.json``. The file's entry ``key`` holds everything
on which the scores depend, so a job runs again after a change of settings, dataset or model. Its entry
``predictions`` is the digest of the file of predictions from which the scores are computed; if that file is
missing or damaged, the job runs again. This module imports no torch, so that a finished evaluation is
recognised in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from typing import Any

from evaluation.candidates.models import Candidate
from evaluation.kinds import predictions
from evaluation.kinds.registry import kind_of
from evaluation.sources.loading import has_part, load
from evaluation.tasks.task import Split, Task
from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Evaluation, grid_values

CODE = 2
"""Version of the code that computes predictions. Increase it if they change; every job then runs again."""
WARM_UP = 0.06
"""Fraction of a run's steps in which the learning rate grows."""
LIBRARIES = ("torch", "transformers", "tokenizers")
"""Packages on whose versions predictions depend."""
MODEL = "model"
"""Name of the folder, beside the score files, of the fine-tuned model that is kept."""
ORIGIN = "fine_tuning.json"
"""File in the folder of a fine-tuned model which says which job made it."""


@dataclass(frozen=True)
class SoftLabels:
    """Files with a fine-tuned teacher's outputs on a task's training set, made by ``teacher_outputs``."""

    model: str
    """Directory of the fine-tuned teacher."""
    outputs: str
    """Path of the files with the teacher's outputs, without their endings."""
    digest: str
    """Digest of everything on which the outputs depend."""


@dataclass(frozen=True)
class HyperParameters:
    epochs: float
    learning_rate: float
    batch_size: int
    max_steps: int | None
    max_length: int


GRID = ("epochs", "learning_rate", "batch_size")
"""Settings that may be lists of values; all combinations of the values are the grid."""


def grid_points(task: Task, settings: Evaluation) -> list[HyperParameters]:
    """Returns the points of the task's grid; only one if no setting is a list, or if nothing is trained.

    A setting of the task takes precedence over the same setting in ``evaluation``. The grid is the same for
    every model, so that no model is tuned more than another.
    """

    def value(name: str) -> Any:
        own = getattr(task.settings, name, None)
        return getattr(settings, name) if own is None else own

    points = product(*(grid_values(value(name)) for name in GRID))
    others = {"max_steps": value("max_steps"), "max_length": task.max_length or settings.max_length}
    grid = [HyperParameters(**dict(zip(GRID, point, strict=True)), **others) for point in points]
    return grid if kind_of(task).fine_tuned else grid[:1]


def grid_folders(points: Sequence[HyperParameters]) -> list[str]:
    """Returns a folder name per point of a grid, made of the values that vary; "" if there is one point."""
    varied = [name for name in GRID if len({getattr(point, name) for point in points}) > 1]
    return ["_".join(f"{name}-{getattr(point, name):g}" for name in varied) for point in points]


@dataclass(frozen=True, eq=False)
class Job:
    """One fine-tuning run. It can be sent to another process."""

    candidate: Candidate
    digest: str
    """``candidate.digest()``, computed once for all jobs of a candidate."""
    task: Task
    seed: int
    settings: Evaluation
    hyper_parameters: HyperParameters
    scores: str
    """Directory of all score files."""
    keep_model: bool = False
    predict_test: bool = False
    soft_labels: SoftLabels | None = None
    """The teacher's outputs for a second distillation; None for plain fine-tuning."""
    folder: str = ""
    """Folder name of the point of the grid; "" if the grid has one point."""

    @property
    def task_name(self) -> str:
        return self.task.name

    @property
    def names(self) -> list[str]:
        """What a line of output calls the job: model, task, point of the grid if there are several, seed."""
        return [*filter(None, (self.candidate.name, self.task_name, self.folder)), f"seed {self.seed}"]

    @property
    def task_directory(self) -> str:
        return storage.join(self.scores, self.candidate.name, self.task_name)

    @property
    def directory(self) -> str:
        return storage.join(self.task_directory, self.folder) if self.folder else self.task_directory

    @property
    def path(self) -> str:
        return storage.join(self.directory, f"seed-{self.seed}.json")

    @property
    def predictions_path(self) -> str:
        return storage.join(self.directory, f"seed-{self.seed}.predictions.parquet")

    @property
    def model_directory(self) -> str:
        return storage.join(self.directory, f"seed-{self.seed}-{MODEL}")

    def origin(self, splits: dict[str, Split]) -> dict[str, Any]:
        """Returns what the file ORIGIN of this job's fine-tuned model holds."""
        key = json.dumps(self.key(splits), sort_keys=True)
        return {"seed": self.seed, "folder": self.folder, "key": storage.digest_bytes(key.encode())}

    def has_model(self, splits: dict[str, Split]) -> bool:
        """Returns whether the job's fine-tuned model exists, in its own folder or as the one that is kept."""
        folders = (self.model_directory, storage.join(self.task_directory, MODEL))
        return any(self.has_model_in(folder, splits) for folder in folders)

    def has_model_in(self, folder: str, splits: dict[str, Split]) -> bool:
        """Returns whether the folder holds this job's fine-tuned model, complete (config.json comes last)."""
        origin = storage.read_object(storage.join(folder, ORIGIN))
        return origin == self.origin(splits) and storage.exists(storage.join(folder, "config.json"))

    def key(self, splits: dict[str, Split]) -> dict[str, Any]:
        """Returns everything on which the job's scores depend, as JSON values."""
        key = asdict(self.hyper_parameters)
        if not kind_of(self.task).fine_tuned:
            key = {"max_length": self.hyper_parameters.max_length, "pooling": self.task.pooling}
        if self.soft_labels is not None:
            key["teacher"] = self.soft_labels.digest
            key["temperature"] = self.settings.distillation_temperature
        if self.task.own is not None:
            key["task"] = [self.task.kind, *self.task.labels]
        return key | {
            "model": self.digest,
            "random_weights": self.candidate.random_weights,
            "data": {part: split.digest() for part, split in splits.items()},
            "dtype": self.settings.dtype,
            "warm_up": WARM_UP,
            "versions": {name: version(name) for name in LIBRARIES},
            "code": CODE + kind_of(self.task).version,
        }


def seed_jobs(
    candidate: Candidate, digest: str, task: Task, settings: Evaluation, scores: str, **options: Any
) -> list[Job]:
    """Returns the jobs of a candidate on a task, for every point of the task's grid and every seed.

    ``options``: the other fields of ``Job``.
    """
    points = grid_points(task, settings)
    seeds = settings.seeds if kind_of(task).fine_tuned else settings.seeds[:1]  # no result depends on it
    return [
        Job(candidate, digest, task, seed, settings, point, scores, folder=folder, **options)
        for point, folder in zip(points, grid_folders(points), strict=True)
        for seed in seeds
    ]


JobWithData = tuple[Job, dict[str, Split]]
"""A job, and name -> split of its task."""


def load_splits(task: Task, data: str | None) -> dict[str, Split]:
    """Returns name -> split for the splits of a task on which a model is trained, chosen and scored."""
    train = ["train"] if kind_of(task).fine_tuned else []
    return {part: load(task, part, data) for part in dict.fromkeys([*train, *predicted_parts(task)])}


def predicted_parts(task: Task) -> list[str]:
    """Returns the names of the labelled splits that are predicted: to choose from the grid, and to score."""
    return list(dict.fromkeys([*(task.dev_parts if kind_of(task).fine_tuned else []), *task.scored_parts]))


def load_test_splits(task: Task, data: str | None) -> dict[str, Split]:
    """Returns name -> split for those of the task's unlabelled test splits that exist."""
    return {part: load(task, part, data) for part in task.test_parts if has_part(task, part, data)}


def finished(
    job: Job, splits: dict[str, Split], test_digests: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Returns the content of the job's score file; None if the job must run (again).

    The job must run if its score file is missing or has another key, if its predictions are missing or
    damaged, or if it predicted other test splits than those of ``test_digests``: name -> digest.
    """
    result = storage.read_object(job.path)
    if result.get("key") != job.key(splits):
        return None
    path = job.predictions_path
    if not storage.exists(path) or storage.digest_file(path) != result.get("predictions"):
        return None
    if job.predict_test and (result.get("test_splits") or {}) != (test_digests or {}):
        return None
    names, main = job.task.metric_keys, list(job.task.main_metrics)
    if set(result["metrics"]) != set(names) or result.get("main_metrics") != main:  # they have changed since
        saved = predictions.read(path, job.task, result["predictions"], predicted_parts(job.task))
        result |= scores_of(job.task, saved)
        with contextlib.suppress(UserError):  # a directory that is only read
            storage.publish_json(job.path, result)
    # In the task's order; the score file sorts its keys.
    return result | {"metrics": {name: result["metrics"][name] for name in names}}


def scores_of(task: Task, predicted: predictions.Predictions) -> dict[str, Any]:
    """Returns ``metrics`` and ``score``, the mean of the ``main_metrics``, on the scored splits, and
    ``dev_score``, as in a score file."""
    metrics = predictions.score(task, {part: predicted[part] for part in task.scored_parts})
    scores: dict[str, Any] = {"metrics": metrics, "main_metrics": list(task.main_metrics)}
    scores["score"] = predictions.task_score(task, metrics)
    if all(part in task.scored_parts for part in predicted):
        return scores | {"dev_score": scores["score"]}
    on_dev = predictions.score(task, {part: predicted[part] for part in task.dev_parts})
    return scores | {"dev_score": predictions.task_score(task, on_dev)}


def median_seed(results: list[dict[str, Any]]) -> int:
    """Returns the seed with the median score, or with the lower of two medians."""
    ranked = sorted(results, key=lambda result: (result["score"], result["seed"]))
    return int(ranked[(len(ranked) - 1) // 2]["seed"])
