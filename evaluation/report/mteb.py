"""Embedding results in MTEB's layout: a file ``<row>/<task>.json`` for each model and task."""

from __future__ import annotations

from typing import Any

from evaluation.finetuning.scores import Plan
from evaluation.kinds.table import kind_of
from evaluation.tasks.task import Task

NAMES = {
    "spearman": "cosine_spearman",
    "pearson": "cosine_pearson",
    "ndcg_10": "ndcg_at_10",
    "recall_100": "recall_at_100",
}
"""Metric -> MTEB's name of it."""
UNDETERMINED = "und-Zyyy"
"""Language and script of a user's own data, which nobody stated (ISO 639-3 and 15924). MTEB leaves out scores
without a language, so that the mean of a file with none would be NaN."""


def results(plan: Plan) -> dict[str, dict[str, Any]]:
    """Path -> content, for every model and task that is scored without training; scores are fractions."""
    found = {}
    for job in plan.chosen:
        if not kind_of(job.task).trained:
            result = plan.done(job)
            revision = job.task.own.revision if job.task.own else None
            digest = plan.splits[job.task_name][job.task.scored_parts[0]].digest()
            found[f"{job.candidate.name}/{job.task_name}.json"] = {
                "task_name": job.task_name,
                "dataset_revision": revision or digest,
                "mteb_version": None,  # the scores are not MTEB's own
                "evaluation_time": result["seconds"],
                "kg_co2_emissions": None,
                "scores": {job.task.scored_parts[0]: [_scores(job.task, result)]},
            }
    return found


def _scores(task: Task, result: dict[str, Any]) -> dict[str, Any]:
    """The entry of one split."""
    metrics = {NAMES[name]: value for name, value in result["metrics"].items()}
    main = metrics[NAMES[task.main[0]]]
    return metrics | {"main_score": main, "hf_subset": "default", "languages": [UNDETERMINED]}
