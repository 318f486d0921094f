"""Plans the fine-tuning runs of an evaluation, runs the unfinished ones, and summarises their scores.

If a task has a grid, every model is trained at every point with every seed. The point with the highest
median score on dev is chosen (the first if scores are equal), and its runs give the reported score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluation.candidates.models import Candidate, copy_files, require_loadable, require_model
from evaluation.finetuning.jobs import (
    MODEL,
    Job,
    JobWithData,
    SoftLabels,
    finished,
    load_splits,
    load_test_splits,
    median_seed,
    seed_jobs,
)
from evaluation.kinds import predictions
from evaluation.kinds.registry import kind_of
from evaluation.measures import intervals
from evaluation.measures.metrics import macro_score
from evaluation.sources.catalogue import GLUE, find_tasks
from evaluation.tasks.task import Split, Task
from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Evaluation

OUTPUTS = "train"
"""File name, without ending, of a fine-tuned teacher's stored outputs, beside its score files."""

OnResult = Callable[[Job, dict[str, Any]], None]
"""Function of a job and the content of its score file."""
Results = dict[str, dict[str, list[dict[str, Any]]]]
"""Candidate -> task -> content of the score files, one per seed, in the order of ``evaluation.seeds``."""
Seeds = dict[int, predictions.Predictions]
"""Seed -> predictions."""


@dataclass
class Plan:
    """All jobs of an evaluation, and the results of the finished ones."""

    jobs: list[Job]
    splits: dict[str, dict[str, Split]]
    """Task -> name of a split -> split."""
    results: dict[Job, dict[str, Any] | None]
    """Job -> content of its score file; None if it is not finished."""
    test_digests: dict[str, dict[str, str]]
    """Task -> name -> digest of the test splits that are predicted for a submission."""

    @property
    def tasks(self) -> dict[str, Task]:
        return {job.task_name: job.task for job in self.jobs}

    @property
    def chosen(self) -> list[Job]:
        """The jobs at the chosen points of the grids, one per candidate, task and seed, all finished."""
        return [job for group in self.grids() for job in self.best_jobs(group)]

    def grids(self) -> list[dict[str, list[Job]]]:
        """Returns, for each candidate and task: folder of a point of the grid -> the jobs of its seeds."""
        by_candidate_and_task: dict[tuple[str, str], dict[str, list[Job]]] = {}
        for job in self.jobs:
            grid = by_candidate_and_task.setdefault((job.candidate.name, job.task_name), {})
            grid.setdefault(job.folder, []).append(job)
        return list(by_candidate_and_task.values())

    def best_jobs(self, grid: dict[str, list[Job]]) -> list[Job]:
        return max(grid.values(), key=self._dev_score) if len(grid) > 1 else next(iter(grid.values()))

    def median_job(self, grid: dict[str, list[Job]]) -> Job:
        """Returns the job with the median seed at the chosen point of a grid whose jobs are all finished."""
        best = self.best_jobs(grid)
        seed = median_seed([self.result_of(job) for job in best])
        return next(job for job in best if job.seed == seed)

    def without_model(self) -> list[Job]:
        """Returns the median jobs whose models are to be kept and do not exist: after a change of the seeds,
        another seed can be the median. Grids with unfinished jobs are left out."""
        medians = [
            self.median_job(grid)
            for grid in self.grids()
            if all(self.results[job] is not None for jobs in grid.values() for job in jobs)
        ]
        return [job for job in medians if job.keep_model and not job.has_model(self.splits[job.task_name])]

    def _dev_score(self, jobs: Sequence[Job]) -> float:
        return float(np.median([self.result_of(job)["dev_score"] for job in jobs]))

    def choices(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Returns candidate -> task -> points of its grid with median dev scores, the chosen point first."""
        by_candidate: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for grid in self.grids():
            if len(grid) == 1:
                continue
            best = self.best_jobs(grid)
            rows = [
                {**asdict(jobs[0].hyper_parameters), "dev_score": self._dev_score(jobs)}
                for jobs in sorted(grid.values(), key=lambda jobs: jobs is not best)
            ]
            by_candidate.setdefault(best[0].candidate.name, {})[best[0].task_name] = rows
        return by_candidate

    def result_of(self, job: Job) -> dict[str, Any]:
        """Returns the content of a finished job's score file."""
        result = self.results[job]
        assert result is not None
        return result

    @property
    def unfinished(self) -> list[JobWithData]:
        return [(job, self.splits[job.task_name]) for job in self.jobs if self.results[job] is None]


def prepare(
    candidates: Sequence[Candidate],
    settings: Evaluation,
    directory: str,
    *,
    keep_models: Sequence[str] = (),
    predict_test: bool = False,
) -> Plan:
    """Returns the plan of all jobs, with the results that exist in ``directory``, the folder of score files.

    ``keep_models``: names of the candidates whose fine-tuned model of the median seed is kept. A candidate
    with ``taught_by`` learns from the outputs of that candidate's fine-tuned models, which are kept too.
    Raises UserError if a task, file, model or vocabulary is wrong. Loads no model if all jobs are finished.
    """
    tasks = find_tasks(settings.tasks)
    for candidate in candidates:
        require_model(candidate.directory, candidate.random_weights)
    splits = {task.name: load_splits(task, settings.data) for task in tasks}
    teachers = {candidate.taught_by for candidate in candidates}
    jobs: list[Job] = []
    for candidate in sorted(candidates, key=lambda candidate: candidate.taught_by is not None):
        digest, kept = candidate.digest(), candidate.name in keep_models or candidate.name in teachers
        for task in tasks:
            teacher = (candidate.taught_by, task.name)
            teacher_jobs = [job for job in jobs if (job.candidate.name, job.task_name) == teacher]
            trained = kind_of(task).fine_tuned
            soft_labels = _soft_labels(teacher_jobs, splits[task.name]) if teacher_jobs and trained else None
            jobs += seed_jobs(
                candidate, digest, task, settings, directory,
                keep_model=kept and trained, predict_test=predict_test, soft_labels=soft_labels,
            )  # fmt: skip
    order = [candidate.name for candidate in candidates]
    jobs.sort(key=lambda job: order.index(job.candidate.name))
    tests = {task.name: load_test_splits(task, settings.data) for task in tasks if predict_test}
    digests = {name: {part: split.digest() for part, split in parts.items()} for name, parts in tests.items()}
    results = {job: finished(job, splits[job.task_name], digests.get(job.task_name)) for job in jobs}
    plan = Plan(jobs, splits, results, digests)
    plan.results |= dict.fromkeys(plan.without_model())
    if plan.unfinished:
        storage.require_writable(directory)
        require_loadable(candidates, tasks, settings)
    return plan


def _soft_labels(teacher: list[Job], splits: dict[str, Split]) -> SoftLabels:
    """Returns where one task's teacher outputs will be stored; the digest is known before the jobs run."""
    keys = json.dumps([job.key(splits) for job in teacher], sort_keys=True)
    directory = teacher[0].task_directory
    model, outputs = storage.join(directory, MODEL), storage.join(directory, OUTPUTS)
    return SoftLabels(model, outputs, storage.digest_bytes(keys.encode()))


def complete(plan: Plan, workers: int, on_result: OnResult = lambda job, result: None) -> Results:
    """Runs the unfinished jobs: first those without soft labels, then second distillations.

    Returns the results of the chosen jobs. ``on_result`` is called for every job: at once for those that are
    finished already, for the others as they finish.
    """
    for job, result in plan.results.items():
        if result is not None:
            on_result(job, result)
    without_teacher = [job for job in plan.jobs if job.soft_labels is None]
    for jobs in (without_teacher, [job for job in plan.jobs if job.soft_labels is not None]):
        _run(jobs, plan, workers, on_result)
        _retrain_medians(jobs, plan, workers, on_result)
        _keep_medians(jobs, plan)
    results: Results = {}
    for job in plan.chosen:
        results.setdefault(job.candidate.name, {}).setdefault(job.task_name, []).append(plan.result_of(job))
    return results


def _run(jobs: Sequence[Job], plan: Plan, workers: int, on_result: OnResult) -> None:
    """Runs the unfinished ones of these jobs."""
    work = [(job, plan.splits[job.task_name]) for job in jobs if plan.results[job] is None]
    if not work:  # returns before torch is imported
        return
    from evaluation.finetuning.parallel import run_all
    from evaluation.finetuning.teacher_outputs import store_outputs

    def record(job: Job, result: dict[str, Any]) -> None:
        plan.results[job] = result
        values = "  ".join(f"{name} {100 * value:.1f}" for name, value in result["metrics"].items())
        train = result["train"]
        rate = f"  ({train['rows_per_second']:,.0f} rows/s)" if train else ""
        print(f"{'  '.join(job.names)}  {values}{rate}", flush=True)
        on_result(job, result)

    distilled = {job.task_name: (job, splits) for job, splits in work if job.soft_labels is not None}
    for job, splits in distilled.values():
        store_outputs(job, splits["train"])
    run_all(work, workers, record)


def _retrain_medians(jobs: Sequence[Job], plan: Plan, workers: int, on_result: OnResult) -> None:
    """Runs a median job again if its model must be kept but does not exist. Raises UserError if it does not
    exist afterwards either, because a worker has other libraries or writes to another disk."""
    again: list[Job] = []
    while lost := [job for job in plan.without_model() if job in jobs]:
        repeated = next((job for job in lost if job in again), None)
        if repeated is not None:
            raise UserError(
                f"{repeated.model_directory}: has no model after its fine-tuning; every worker must have the"
                " same libraries and see the same files"
            )
        again += lost
        plan.results |= dict.fromkeys(lost)
        _run(lost, plan, workers, on_result)


def _keep_medians(jobs: Sequence[Job], plan: Plan) -> None:
    """Keeps one model per candidate and task, the median seed's at the chosen point of the grid.

    Moves it to ``<task>/model``, unless it is there, and removes the others.
    """
    kept = {job for job in jobs if job.keep_model}
    for grid in plan.grids():
        in_grid = [job for seeds in grid.values() for job in seeds]
        if in_grid[0] not in kept:
            continue
        median = plan.median_job(grid)
        source = median.model_directory
        if median.has_model_in(source, plan.splits[median.task_name]):
            final = storage.join(median.task_directory, MODEL)
            storage.remove_tree(final)
            copy_files(source, final)
        for job in in_grid:
            if storage.list_names(job.model_directory):
                storage.remove_tree(job.model_directory)


def medians(results: list[dict[str, Any]]) -> dict[str, float]:
    """Returns each metric's median over the seeds, and ``score``, the median of the seeds' task scores."""
    names = list(results[0]["metrics"])
    values = {name: float(np.median([result["metrics"][name] for result in results])) for name in names}
    return values | {"score": float(np.median([result["score"] for result in results]))}


def macro_tasks(tasks: Iterable[str]) -> list[str]:
    """Returns the tasks whose mean is the macro score: those of GLUE, or all if none belongs to GLUE."""
    names = list(tasks)
    return [name for name in names if name in GLUE] or names


def macro(scores: dict[str, float]) -> float:
    """Returns the mean score of the ``macro_tasks``. ``scores``: task -> score."""
    return macro_score({name: scores[name] for name in macro_tasks(scores)})


def read_answers(plan: Plan) -> dict[tuple[str, str], Seeds]:
    """Returns (candidate, task) -> the predictions of every seed, in the plan's order."""
    answers: dict[tuple[str, str], Seeds] = {}
    for job in plan.chosen:
        saved = predictions.read(job.predictions_path, job.task, plan.result_of(job)["predictions"])
        answers.setdefault((job.candidate.name, job.task_name), {})[job.seed] = saved
    return answers


def estimates(
    plan: Plan, answers: Mapping[tuple[str, str], Seeds]
) -> tuple[dict[str, intervals.Estimates], intervals.Estimates]:
    """Returns the scores' estimates per task, and the macro score's. ``answers``: from ``read_answers``."""
    by_task = {}
    for name, task in plan.tasks.items():
        models = [list(seeds.values()) for (_, task_name), seeds in answers.items() if task_name == name]
        sizes = {part: len(one) for part, one in models[0][0].items()}
        scorers = [[predictions.resampled_score(task, one_seed) for one_seed in seeds] for seeds in models]
        by_task[name] = intervals.estimate(scorers, sizes)
    return by_task, intervals.mean([by_task[name] for name in macro_tasks(by_task)])
