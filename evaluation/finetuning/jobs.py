"""The jobs of an evaluation: one for each candidate, task, setting and seed. A score file marks it as done.

A score file ``<scores>/<candidate>/<task>/seed-<n>.json`` (of a grid ``<task>/<setting>/seed-<n>.json``)
holds under ``key`` everything on which its numbers depend, so a job runs again after a change of settings,
dataset or model. ``predictions`` is the digest of the file from which its numbers are computed
(``evaluation.measures.predictions``). Without that file the job runs again. Imports no torch, so that a
finished evaluation is recognised in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from typing import Any

from evaluation.kinds.registry import kind_of
from evaluation.measures import predictions
from evaluation.models import Candidate
from evaluation.tasks.loading import load
from evaluation.tasks.task import Split, Task
from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Evaluation, grid_values

CODE = 2
"""Version of the code that decides predictions. A change of them raises it, so that scores are made again."""
WARM_UP = 0.06
"""Share of a run's steps in which the learning rate grows."""
LIBRARIES = ("torch", "transformers", "tokenizers")
"""Packages whose versions decide predictions."""
MODEL = "model"
"""Folder of the fine-tuned model beside its score files, where it is kept."""


@dataclass(frozen=True)
class Lesson:
    """A fine-tuned teacher's outputs on the task's training set, see ``teacher_pass``."""

    model: str
    """Directory of the fine-tuned teacher."""
    outputs: str
    """Path of its outputs, without an ending."""
    digest: str
    """Of everything that the outputs depend on."""


@dataclass(frozen=True)
class Setting:
    """The hyper-parameters of a run."""

    epochs: float
    learning_rate: float
    batch_size: int
    max_steps: int | None
    max_length: int


GRID = ("epochs", "learning_rate", "batch_size")


def settings_of(task: Task, settings: Evaluation) -> list[Setting]:
    """Every setting of the task's grid, one where nothing is a list. The task's own come before the recipe's.

    The grid does not depend on the model, so that no model is searched longer than another.
    """

    def value(name: str) -> Any:
        own = getattr(task.settings, name, None)
        return getattr(settings, name) if own is None else own

    points = product(*(grid_values(value(name)) for name in GRID))
    found = [
        Setting(
            **dict(zip(GRID, point, strict=True)),
            max_steps=value("max_steps"),
            max_length=task.max_length or settings.max_length,
        )
        for point in points
    ]
    return found if kind_of(task).fine_tuned else found[:1]


def seeds_of(task: Task, settings: Evaluation) -> tuple[int, ...]:
    """All seeds; the first one where nothing is trained."""
    return settings.seeds if kind_of(task).fine_tuned else settings.seeds[:1]


def setting_names(points: Sequence[Setting]) -> list[str]:
    """Folder names of a grid's settings: what differs between them; "" for the only one."""
    varied = [name for name in GRID if len({getattr(point, name) for point in points}) > 1]
    return ["_".join(f"{name}-{getattr(point, name):g}" for name in varied) for point in points]


@dataclass(frozen=True, eq=False)
class Job:
    """One run. Everything in it can be sent to another process."""

    candidate: Candidate
    digest: str
    """``candidate.digest()``, taken once for all jobs of a candidate."""
    task: Task
    seed: int
    settings: Evaluation
    setting: Setting
    scores: str
    """Directory of all score files."""
    keep_model: bool = False
    predict_test: bool = False
    lesson: Lesson | None = None
    """The teacher's outputs of a second distillation; None for plain fine-tuning."""
    folder: str = ""
    """Of the setting, in a grid."""

    @property
    def task_name(self) -> str:
        return self.task.name

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.candidate.name, self.task_name, self.folder, f"seed {self.seed}")))

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

    def key(self, splits: dict[str, Split]) -> dict[str, Any]:
        settings = self.settings
        more: dict[str, Any] = {}
        if self.lesson is not None:
            more["teacher"] = self.lesson.digest
            more["temperature"] = settings.distillation_temperature
        if self.task.own is not None:
            more["task"] = [self.task.kind, *self.task.labels]
        setting = asdict(self.setting)
        if not kind_of(self.task).fine_tuned:
            setting = {"max_length": self.setting.max_length, "pooling": self.task.pooling}
        return (
            more
            | setting
            | {
                "model": self.digest,
                "random_weights": self.candidate.random_weights,
                "data": {part: split.digest() for part, split in splits.items()},
                "dtype": settings.dtype,
                "warm_up": WARM_UP,
                "versions": {name: version(name) for name in LIBRARIES},
                "code": CODE,
            }
        )


Work = tuple[Job, dict[str, Split]]
"""A job and the parts of its task."""


def load_splits(task: Task, data: str | None) -> dict[str, Split]:
    """The parts of a task on which a model is trained, chosen and scored."""
    train = ["train"] if kind_of(task).fine_tuned else []
    return {part: load(task, part, data) for part in dict.fromkeys([*train, *answered(task)])}


def answered(task: Task) -> list[str]:
    """The labelled parts for which a model's answers are kept: those of the choice and of the score."""
    return list(dict.fromkeys([*(task.dev_parts if kind_of(task).fine_tuned else []), *task.scored_parts]))


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
    folders = (job.model_directory, storage.join(job.task_directory, MODEL))
    if job.keep_model and not any(storage.list_names(folder) for folder in folders):
        return None
    if job.predict_test and "test_splits" not in result:
        return None
    return _with_metrics(job, result)


def _with_metrics(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """The result with the metrics that the task has now: they are functions of the predictions."""
    if list(result["metrics"]) == job.task.metric_keys:
        return result
    parts = answered(job.task)
    found = predictions.read(job.predictions_path, job.task, result["predictions"], parts)
    scores = scores_of(job.task, found)
    storage.publish_json(job.path, result | scores)
    return result | scores


def scores_of(task: Task, found: predictions.Predictions) -> dict[str, Any]:
    """Of a score file: metrics and score of the scored parts, and the score on dev."""
    metrics = predictions.score(task, {part: found[part] for part in task.scored_parts})
    scores = {"metrics": metrics, "score": predictions.task_score(task, metrics)}
    if all(part in task.scored_parts for part in found):
        return scores | {"dev_score": scores["score"]}
    on_dev = predictions.score(task, {part: found[part] for part in task.dev_parts})
    return scores | {"dev_score": predictions.task_score(task, on_dev)}


def median_seed(results: list[dict[str, Any]]) -> int:
    """The seed whose score is the median; for an even number of seeds, the lower of the two middle ones."""
    ranked = sorted(results, key=lambda result: (result["score"], result["seed"]))
    return int(ranked[(len(ranked) - 1) // 2]["seed"])
