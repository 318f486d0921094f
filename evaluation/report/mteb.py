"""Converts embedding results to MTEB's layout: one file ``<row>/<task>.json`` per model and task."""

from __future__ import annotations

from typing import Any

from evaluation.finetuning.scores import Plan
from evaluation.kinds.registry import kind_of
from evaluation.tasks.task import Task

NAMES = {
    "spearman": "cosine_spearman",
    "pearson": "cosine_pearson",
    "ndcg_10": "ndcg_at_10",
    "recall_100": "recall_at_100",
}
"""Name of a metric here -> its name in MTEB."""
UNDETERMINED = "und-Zyyy"
"""Undetermined language and script (ISO 639-3 and 15924), because recipes do not name the language of their
data. MTEB ignores scores without any language."""


def results(plan: Plan) -> dict[str, dict[str, Any]]:
    """Returns path -> content of a file, for every model and task that is scored without fine-tuning."""
    contents = {}
    for job in plan.chosen:
        if not kind_of(job.task).fine_tuned:
            result = plan.result_of(job)
            revision = job.task.own.revision if job.task.own else None
            digest = plan.splits[job.task_name][job.task.scored_parts[0]].digest()
            contents[f"{job.candidate.name}/{job.task_name}.json"] = {
                "task_name": job.task_name,
                "dataset_revision": revision or digest,
                "mteb_version": None,  # the scores are not MTEB's own
                "evaluation_time": result["seconds"],
                "kg_co2_emissions": None,
                "scores": {job.task.scored_parts[0]: [_scores(job.task, result)]},
            }
    return contents


def _scores(task: Task, result: dict[str, Any]) -> dict[str, Any]:
    """Returns MTEB's entry of one split; scores are fractions."""
    metrics = {NAMES[name]: value for name, value in result["metrics"].items()}
    main = metrics[NAMES[task.main_metrics[0]]]
    return metrics | {"main_score": main, "hf_subset": "default", "languages": [UNDETERMINED]}
