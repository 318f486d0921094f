"""All fine-tuning runs of an evaluation: finding and running the missing ones, the choice of settings, and
medians over seeds.

Where a task has a grid of settings, every model runs all of it with all seeds. The setting with the
highest median score on dev is used, the first of several equal ones. Its runs give the reported score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from evaluation.finetuning.jobs import (
    MODEL,
    Job,
    Lesson,
    Work,
    finished,
    load_splits,
    median_seed,
    seeds_of,
    setting_names,
    settings_of,
)
from evaluation.kinds.registry import kind_of
from evaluation.measures import intervals, predictions
from evaluation.measures.metrics import macro_score
from evaluation.models import Candidate, load_config, load_model, load_tokenizer, require_fit, require_model
from evaluation.tasks.catalogue import GLUE, find_tasks
from evaluation.tasks.task import Split, Task
from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Evaluation

OUTPUTS = "train"
"""Prefix of the file names of a fine-tuned teacher's stored outputs, which lie beside its score files."""

Tell = Callable[[Job, dict[str, Any]], None]
"""Called with a job and the content of its score file."""
Results = dict[str, dict[str, list[dict[str, Any]]]]
"""candidate -> task -> the score files of its seeds, in the order of ``evaluation.seeds``."""
Seeds = dict[int, predictions.Predictions]
"""Seed -> predictions."""


@dataclass
class Plan:
    """Every run of an evaluation, with the results of those that are done."""

    jobs: list[Job]
    splits: dict[str, dict[str, Split]]
    results: dict[Job, dict[str, Any] | None]

    @property
    def tasks(self) -> dict[str, Task]:
        return {job.task_name: job.task for job in self.jobs}

    @property
    def chosen(self) -> list[Job]:
        """The jobs of the chosen settings: one for each candidate, task and seed. All jobs must be done."""
        return [job for group in self.groups() for job in self.best(group)]

    def groups(self) -> list[dict[str, list[Job]]]:
        """For each candidate and task: a setting's folder -> the jobs of its seeds."""
        found: dict[tuple[str, str], dict[str, list[Job]]] = {}
        for job in self.jobs:
            grid = found.setdefault((job.candidate.name, job.task_name), {})
            grid.setdefault(job.folder, []).append(job)
        return list(found.values())

    def best(self, grid: dict[str, list[Job]]) -> list[Job]:
        return max(grid.values(), key=self._dev_score) if len(grid) > 1 else next(iter(grid.values()))

    def _dev_score(self, jobs: Sequence[Job]) -> float:
        return float(np.median([self.done(job)["dev_score"] for job in jobs]))

    def choices(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """candidate -> task -> each setting of its grid with its median score on dev, the chosen first."""
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for grid in self.groups():
            if len(grid) == 1:
                continue
            best = self.best(grid)
            rows = [
                {**asdict(jobs[0].setting), "dev_score": self._dev_score(jobs)}
                for jobs in sorted(grid.values(), key=lambda jobs: jobs is not best)
            ]
            found.setdefault(best[0].candidate.name, {})[best[0].task_name] = rows
        return found

    def done(self, job: Job) -> dict[str, Any]:
        """The score file of a job that is done."""
        result = self.results[job]
        assert result is not None
        return result

    @property
    def left(self) -> list[Work]:
        return [(job, self.splits[job.task_name]) for job in self.jobs if self.results[job] is None]


def prepare(
    candidates: Sequence[Candidate],
    settings: Evaluation,
    directory: str,
    *,
    keep_models: Sequence[str] = (),
    predict_test: bool = False,
) -> Plan:
    """Every candidate, task and seed, and which score files under ``directory`` are there already.

    ``keep_models``: names of the candidates whose fine-tuned model of the median seed is kept.
    Tasks, files, models and vocabularies are checked before the first run. If every run is done, no model is
    loaded. A candidate with ``taught_by`` learns from the outputs of the other candidate's fine-tuned models,
    which are kept too.
    """
    tasks = find_tasks(settings.tasks)
    for candidate in candidates:
        require_model(candidate.directory, candidate.random_weights)
    splits = {task.name: load_splits(task, settings.data) for task in tasks}
    teachers = {candidate.taught_by for candidate in candidates}
    jobs: list[Job] = []
    for candidate in sorted(candidates, key=lambda candidate: candidate.taught_by is not None):
        first = Job(
            candidate, candidate.digest(), tasks[0], 0, settings, settings_of(tasks[0], settings)[0],
            directory,
            keep_model=candidate.name in keep_models or candidate.name in teachers,
            predict_test=predict_test,
        )  # fmt: skip
        for task in tasks:
            teacher = (candidate.taught_by, task.name)
            taught = [job for job in jobs if (job.candidate.name, job.task_name) == teacher]
            trained = kind_of(
                task
            ).fine_tuned  # without training there is nothing to teach and no model to keep
            lesson = _lesson(taught, splits[task.name]) if taught and trained else None
            jobs += _grid(replace(first, task=task, lesson=lesson, keep_model=first.keep_model and trained))
    order = [candidate.name for candidate in candidates]
    jobs.sort(key=lambda job: order.index(job.candidate.name))
    plan = Plan(jobs, splits, {job: finished(job, splits[job.task_name]) for job in jobs})
    if plan.left:
        storage.require_writable(directory)
        _check(candidates, tasks, settings)
    return plan


def _grid(job: Job) -> list[Job]:
    """The job with every setting and seed of its task."""
    points = settings_of(job.task, job.settings)
    return [
        replace(job, setting=setting, folder=name, seed=seed)
        for setting, name in zip(points, setting_names(points), strict=True)
        for seed in seeds_of(job.task, job.settings)
    ]


def _lesson(teacher: list[Job], splits: dict[str, Split]) -> Lesson:
    """Where the outputs of the teacher's runs of one task will be. The digest follows from the runs' keys, so
    it is known before they run."""
    keys = json.dumps([job.key(splits) for job in teacher], sort_keys=True)
    directory = teacher[0].task_directory
    model, outputs = storage.join(directory, MODEL), storage.join(directory, OUTPUTS)
    return Lesson(model, outputs, storage.digest_bytes(keys.encode()))


def complete(plan: Plan, workers: int, tell: Tell = lambda job, result: None) -> Results:
    """Runs the jobs that are left: first those without a teacher, then second distillations. Returns the
    content of the chosen jobs' score files.

    ``tell`` gets every score file: those that are there first, the others as they are published.
    """
    for job, result in plan.results.items():
        if result is not None:
            tell(job, result)
    untaught = [job for job in plan.jobs if job.lesson is None]
    for jobs in (untaught, [job for job in plan.jobs if job.lesson is not None]):
        _run(jobs, plan, workers, tell)
        _keep_medians(jobs, plan)
    results: Results = {}
    for job in plan.chosen:
        results.setdefault(job.candidate.name, {}).setdefault(job.task_name, []).append(plan.done(job))
    return results


def _run(jobs: Sequence[Job], plan: Plan, workers: int, tell: Tell) -> None:
    """Run those of the jobs that are not done."""
    left = [(job, plan.splits[job.task_name]) for job in jobs if plan.results[job] is None]
    if not left:  # no torch is needed
        return
    from evaluation.finetuning.parallel import run_all
    from evaluation.finetuning.teacher_outputs import store_outputs

    def record(job: Job, result: dict[str, Any]) -> None:
        plan.results[job] = result
        values = "  ".join(f"{name} {100 * value:.1f}" for name, value in result["metrics"].items())
        train = result["train"]
        rate = f"  ({train['rows_per_second']:,.0f} rows/s)" if train else ""
        names = filter(None, (job.candidate.name, job.task_name, job.folder, f"seed {job.seed}"))
        print(f"{'  '.join(names)}  {values}{rate}", flush=True)
        tell(job, result)

    lessons = {job.task_name: (job, splits) for job, splits in left if job.lesson is not None}
    for job, splits in lessons.values():
        store_outputs(job, splits["train"])
    run_all(left, workers, record)


def _keep_medians(jobs: Sequence[Job], plan: Plan) -> None:
    """Keeps one model for each candidate and task: that of the chosen setting's median seed."""
    kept = {job for job in jobs if job.keep_model}
    for grid in plan.groups():
        if next(iter(grid.values()))[0] in kept:
            _keep_median(plan, grid)


def _check(candidates: Sequence[Candidate], tasks: Sequence[Task], settings: Evaluation) -> None:
    for candidate in candidates:
        tokenizer = load_tokenizer(candidate.directory)
        config = load_config(candidate.directory)
        for task in tasks:
            require_fit(candidate.directory, config, tokenizer, task.max_length or settings.max_length)
        load_model(candidate, tasks[0], seed=0)  # damaged weights are found now, not after hours
    teachers = {candidate.name: candidate for candidate in candidates}
    for candidate in candidates:
        spans = [task.name for task in tasks if kind_of(task).per_token]
        if candidate.taught_by is not None and spans:
            teacher = teachers[candidate.taught_by]
            vocabularies = [load_tokenizer(one.directory).get_vocab() for one in (candidate, teacher)]
            if vocabularies[0] != vocabularies[1]:
                raise UserError(
                    f"second distillation on {spans[0]}: the teacher's outputs belong to tokens, but "
                    f"{candidate.directory} and {teacher.directory} have different vocabularies"
                )


def _keep_median(plan: Plan, grid: dict[str, list[Job]]) -> None:
    """Keeps only one model, as ``<task>/model``; does nothing if that is done already."""
    best = plan.best(grid)
    seed = median_seed([plan.done(job) for job in best])
    source = next(job.model_directory for job in best if job.seed == seed)
    names = storage.list_names(source)
    if names:
        final = storage.join(best[0].task_directory, MODEL)
        storage.remove_tree(final)
        for name in sorted(names, key=lambda name: (name == "config.json", name)):
            storage.publish_bytes(storage.join(final, name), storage.read_bytes(storage.join(source, name)))
    for job in (job for jobs in grid.values() for job in jobs):
        if storage.list_names(job.model_directory):
            storage.remove_tree(job.model_directory)


def medians(results: list[dict[str, Any]]) -> dict[str, float]:
    """Each metric's median over the seeds, and ``score``, the median of the seeds' task scores."""
    names = list(results[0]["metrics"])
    values = {name: float(np.median([result["metrics"][name] for result in results])) for name in names}
    return values | {"score": float(np.median([result["score"] for result in results]))}


def macro_tasks(tasks: Iterable[str]) -> list[str]:
    """The tasks of which the macro score is the mean: those of GLUE, or all if none belongs to GLUE."""
    names = list(tasks)
    return [name for name in names if name in GLUE] or names


def macro(scores: dict[str, float]) -> float:
    """The mean score of the ``macro_tasks``."""
    return macro_score({name: scores[name] for name in macro_tasks(scores)})


def read_answers(plan: Plan) -> dict[tuple[str, str], Seeds]:
    """Candidate and task -> the predictions of every seed, in the plan's order."""
    found: dict[tuple[str, str], Seeds] = {}
    for job in plan.chosen:
        read = predictions.read(job.predictions_path, job.task, plan.done(job)["predictions"])
        found.setdefault((job.candidate.name, job.task_name), {})[job.seed] = read
    return found


def estimates(
    plan: Plan, found: Mapping[tuple[str, str], Seeds]
) -> tuple[dict[str, intervals.Estimates], intervals.Estimates]:
    """Scores and their errors of every task, and of the macro score; ``found``: from ``read_answers``."""
    by_task = {
        name: _estimate(
            task, [list(seeds.values()) for (_, task_name), seeds in found.items() if task_name == name]
        )
        for name, task in plan.tasks.items()
    }
    return by_task, intervals.mean([by_task[name] for name in macro_tasks(by_task)])


def _estimate(task: Task, models: list[list[predictions.Predictions]]) -> intervals.Estimates:
    sizes = {part: len(answers) for part, answers in models[0][0].items()}
    scorers = [[predictions.resampled_score(task, found) for found in seeds] for seeds in models]
    return intervals.estimate(scorers, sizes)
