"""All fine-tuning runs of an evaluation: finding and running the missing ones, and medians over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.finetuning.jobs import MODEL, Job, Lesson, Work, finished, load_splits, median_seed
from evaluation.measures import intervals, predictions
from evaluation.measures.metrics import macro_score
from evaluation.models import Candidate, load_config, load_model, load_tokenizer, require_fit, require_model
from evaluation.tasks import submission
from evaluation.tasks.catalogue import GLUE, find_task, find_tasks
from evaluation.tasks.task import Split, Task
from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Evaluation

OUTPUTS = "outputs"
"""Folder of a fine-tuned teacher's stored outputs beside its score files."""

Results = dict[str, dict[str, list[dict[str, Any]]]]
"""candidate -> task -> the score files of its seeds, in the order of ``evaluation.seeds``."""


@dataclass
class Plan:
    """Every run of an evaluation, with the results of those that are done."""

    jobs: list[Job]
    splits: dict[str, dict[str, Split]]
    results: dict[Job, dict[str, Any] | None]

    @property
    def chosen(self) -> list[Job]:
        """The jobs that count, one a candidate, task and seed."""
        return self.jobs

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
    loaded. A candidate with ``taught_by`` learns from the outputs of the fine-tuned models of that candidate,
    which are kept too.
    """
    tasks = find_tasks(settings.tasks)
    for candidate in candidates:
        require_model(candidate.directory, candidate.random_weights)
    splits = {task.name: load_splits(task, settings.data) for task in tasks}
    teachers = {candidate.taught_by for candidate in candidates}
    jobs: list[Job] = []
    for candidate in sorted(candidates, key=lambda candidate: candidate.taught_by is not None):
        digest = candidate.digest()
        for task in tasks:
            lesson = None
            if candidate.taught_by is not None:
                taught = [job for job in jobs if job.candidate.name == candidate.taught_by]
                lesson = _lesson([job for job in taught if job.task_name == task.name], splits[task.name])
            keep = candidate.name in keep_models or candidate.name in teachers
            jobs += [
                Job(candidate, digest, task.name, seed, settings, directory, keep, predict_test, lesson)
                for seed in settings.seeds
            ]
    order = [candidate.name for candidate in candidates]
    jobs.sort(key=lambda job: order.index(job.candidate.name))
    plan = Plan(jobs, splits, {job: finished(job, splits[job.task_name]) for job in jobs})
    if plan.left:
        storage.require_writable(directory)
        _check(candidates, tasks, settings)
    return plan


def _lesson(teacher: list[Job], splits: dict[str, Split]) -> Lesson:
    """The lesson from the teacher's runs of one task. Its digest is known before they run."""
    keys = json.dumps([job.key(splits) for job in teacher], sort_keys=True)
    directory = teacher[0].directory
    model, outputs = storage.join(directory, MODEL), storage.join(directory, OUTPUTS)
    return Lesson(model, outputs, storage.digest_bytes(keys.encode()))


def complete(plan: Plan, workers: int) -> Results:
    """Run what is left, second distillations after the teachers they need; the score files of all."""
    alone = [job for job in plan.jobs if job.lesson is None]
    for jobs in (alone, [job for job in plan.jobs if job.lesson is not None]):
        _run(jobs, plan, workers)
        _keep_medians(jobs, plan)
    results: Results = {}
    for job in plan.jobs:
        results.setdefault(job.candidate.name, {}).setdefault(job.task_name, []).append(_done(plan, job))
    return results


def _run(jobs: Sequence[Job], plan: Plan, workers: int) -> None:
    """Run those of the jobs that are not done."""
    left = [(job, plan.splits[job.task_name]) for job in jobs if plan.results[job] is None]
    if not left:  # no torch is needed
        return
    from evaluation.finetuning.parallel import run_all
    from evaluation.finetuning.teacher_pass import store_lesson

    def record(job: Job, result: dict[str, Any]) -> None:
        plan.results[job] = result
        values = "  ".join(f"{name} {100 * value:.1f}" for name, value in result["metrics"].items())
        rate = result["train"]["rows_per_second"]
        print(
            f"{job.candidate.name}  {job.task_name}  seed {job.seed}  {values}  ({rate:,.0f} rows/s)",
            flush=True,
        )

    lessons = {job.task_name: (job, splits) for job, splits in left if job.lesson is not None}
    for job, splits in lessons.values():
        store_lesson(job, splits["train"])
    run_all(left, workers, record)


def _done(plan: Plan, job: Job) -> dict[str, Any]:
    result = plan.results[job]
    assert result is not None
    return result


def _keep_medians(jobs: Sequence[Job], plan: Plan) -> None:
    seeds: dict[str, list[Job]] = {}
    for job in jobs:
        if job.keep_model:
            seeds.setdefault(job.directory, []).append(job)
    for group in seeds.values():
        _keep_median(group[0], [_done(plan, job) for job in group])


def _check(candidates: Sequence[Candidate], tasks: Sequence[Task], settings: Evaluation) -> None:
    for candidate in candidates:
        tokenizer = load_tokenizer(candidate.directory)
        config = load_config(candidate.directory)
        for task in tasks:
            require_fit(candidate.directory, config, tokenizer, task.max_length or settings.max_length)
        load_model(candidate, tasks[0], seed=0)  # damaged weights are found now, not after hours
    teachers = {candidate.name: candidate for candidate in candidates}
    for candidate in candidates:
        spans = [task.name for task in tasks if task.kind == "spans"]
        if candidate.taught_by is not None and spans:
            teacher = teachers[candidate.taught_by]
            vocabularies = [load_tokenizer(one.directory).get_vocab() for one in (candidate, teacher)]
            if vocabularies[0] != vocabularies[1]:
                raise UserError(
                    f"second distillation on {spans[0]}: start and end belong to tokens, but "
                    f"{candidate.directory} and {teacher.directory} have different vocabularies"
                )


def _keep_median(job: Job, results: list[dict[str, Any]]) -> None:
    """Keeps only the median seed's model, as ``<task>/model``; does nothing if that is done already."""
    folders = [
        name
        for name in storage.list_names(job.directory)
        if name.startswith("seed-") and name.endswith(MODEL)
    ]
    chosen = f"seed-{median_seed(results)}-{MODEL}"
    if chosen in folders:
        final = storage.join(job.directory, MODEL)
        storage.remove_tree(final)
        source = storage.join(job.directory, chosen)
        for name in sorted(storage.list_names(source), key=lambda name: (name == "config.json", name)):
            storage.publish_bytes(storage.join(final, name), storage.read_bytes(storage.join(source, name)))
    for name in folders:
        storage.remove_tree(storage.join(job.directory, name))


def medians(results: list[dict[str, Any]]) -> dict[str, float]:
    """Each metric's median over the seeds, and ``score``, the median of the seeds' task scores."""
    names = list(results[0]["metrics"])
    values = {name: float(np.median([result["metrics"][name] for result in results])) for name in names}
    return values | {"score": float(np.median([result["score"] for result in results]))}


def macro_tasks(tasks: Iterable[str]) -> list[str]:
    """The tasks of which the macro score is the mean: those of GLUE (all, where none is GLUE's)."""
    names = list(tasks)
    return [name for name in names if name in GLUE] or names


def macro(scores: dict[str, float]) -> float:
    """The mean score of the ``macro_tasks``."""
    return macro_score({name: scores[name] for name in macro_tasks(scores)})


def estimates(plan: Plan) -> tuple[dict[str, intervals.Estimates], intervals.Estimates]:
    """Scores and their errors of every task, and of the macro score, from the predictions of all runs.

    The models are in the plan's order.
    """
    tasks: dict[str, dict[str, list[predictions.Predictions]]] = {}
    for job in plan.chosen:
        found = predictions.read(job.predictions_path, job.task, _done(plan, job)["predictions"])
        tasks.setdefault(job.task_name, {}).setdefault(job.candidate.name, []).append(found)
    by_task = {name: _estimate(find_task(name), list(models.values())) for name, models in tasks.items()}
    return by_task, intervals.mean([by_task[name] for name in macro_tasks(by_task)])


def _estimate(task: Task, models: list[list[predictions.Predictions]]) -> intervals.Estimates:
    sizes = {part: len(answers) for part, answers in models[0][0].items()}
    scorers = [[predictions.resampled_score(task, found) for found in seeds] for seeds in models]
    return intervals.estimate(scorers, sizes)


def write_submission(candidate: Candidate, results: Results, directory: str, target: str) -> list[str]:
    """Zip the median seeds' test predictions of one candidate into ``target``; names of the files in it."""
    files = {}
    for task, seeds in results[candidate.name].items():
        seed = median_seed(seeds)
        chosen = next(result for result in seeds if result["seed"] == seed)
        for name in chosen.get("test_files", []):
            path = storage.join(directory, candidate.name, task, name)
            files[name.partition(".")[2]] = storage.read_bytes(path)
    if files:
        storage.publish_bytes(target, submission.zip_bytes(files))
    return sorted(files)
