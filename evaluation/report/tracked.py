"""Logs an evaluation to the tracking run: first the store and the datasets, then the score of each seed as it
finishes, and at the end the report, the headline metrics and the students as registered models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.candidates.recipe_rows import TEACHER, Rows
from evaluation.finetuning.jobs import Job
from evaluation.finetuning.scores import Plan
from evaluation.report import tables
from evaluation.sources.loading import location_of
from infra.files import storage
from infra.settings.recipe import Recipe
from infra.tracking.mlflow_sender import ARTIFACTS_PLACEHOLDER
from infra.tracking.run import Run
from offline_teacher.store.paths import MANIFEST
from offline_teacher.store.store import open_store

DEVICE_NUMBERS = ("score", "int8_score", "int8_lost", "bytes", "int8_size_ratio", "difference")
"""Keys of ``devices.<student>.<task>`` that become metrics."""
_NOT_METRICS = ("student", "references", "best_reference", "seed_scores", "differences")
"""Keys of a row that do not become metrics: names, the scores of seeds, which are metrics of nested runs, and
the paired differences, which are only in the report."""


def log_data(run: Run, plan: Plan, recipe: Recipe) -> None:
    """Logs the recipe's store, if it is finished, and every split of every task as datasets.

    The digest of a split is the one in the keys of saved scores.
    """
    if storage.exists(storage.join(recipe.store_path, MANIFEST)):
        run.log_store(recipe.store_path, open_store(recipe.store_path).digest)
    for name, parts in plan.splits.items():
        for part, split in parts.items():
            context = "training" if part == "train" else "evaluation"
            source = location_of(plan.tasks[name], part, recipe.evaluation.data)
            run.log_dataset(f"{name} {part}", source, split.digest(), context)


def log_score(run: Run, job: Job, result: Mapping[str, Any]) -> None:
    """Logs the score of one seed to the nested run of its model, task and fine-tuning settings."""
    name = "/".join(filter(None, (job.candidate.name, job.task_name, job.folder)))
    values = {key: result[key] for key in ("score", "dev_score")} | result["metrics"]
    if result["train"]:
        values |= {f"train/{key}": result["train"][key] for key in ("loss", "rows_per_second")}
    run.log_child(name, values, job.seed, {"model": job.candidate.name, "task": job.task_name})


def track(run: Run, rows: Rows, content: dict[str, Any], files: Sequence[str]) -> None:
    """Logs the report and its files, and registers each student as a model version with its scores."""
    run.log_metrics(numbers(content))
    for file in files:
        run.log_artifact(file, "evaluation")
    note = description(content, next(file for file in files if file.endswith("report.html")))
    for one in rows.candidates:
        if one.name not in rows.students:
            continue
        row = content["rows"][one.name]
        tags = {"macro": f"{row['macro']:.6f}", "tasks": ",".join(sorted(row["scores"]))}
        values = headline_of(content, one.name, rows.kl.get(one.name))
        values |= {f"score/{task}": metrics["score"] for task, metrics in row["scores"].items()}
        run.register_model(
            one.directory, rows.students[one.name].registered_name, alias="best", tags=tags, score="macro",
            scores=values, note=note,
        )  # fmt: skip
    run.log_headline(headline(content, rows.kl), note)


def headline(content: Mapping[str, Any], kl: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics by which recipes are compared: those of the best student and, if there are several
    students, those of each with the prefix ``<student>/``.

    Without students, all rows but the teacher take their place. kl: student -> KL to the teacher.
    """
    names = content["students"] or [name for name in content["rows"] if name != TEACHER] or [TEACHER]
    best = max(names, key=lambda name: content["rows"][name]["macro"])
    metrics = headline_of(content, best, kl.get(best))
    for name in names if len(names) > 1 else ():
        of_row = headline_of(content, name, kl.get(name))
        metrics |= {f"{name}/{key}": value for key, value in of_row.items()}
    return {_metric_name(name): value for name, value in metrics.items()}


def headline_of(content: Mapping[str, Any], name: str, kl: float | None) -> dict[str, float]:
    """Returns the headline metrics of one row; unknown ones are left out."""
    row = content["rows"][name]
    metrics = {key: row[key] for key in ("macro", "retention", "gap_closed", "gap_closed_best")}
    metrics |= {"kl": kl, "megabytes": row["bytes"] / 1e6, "p50_ms": row["latency"]["p50_ms"]}
    return {key: float(value) for key, value in metrics.items() if value is not None}


def description(content: Mapping[str, Any], report: str) -> str:
    """Returns the Markdown description of the run and of each model version: overview, link to the report."""
    table = tables.markdown_table(*tables.overview_rows(content))
    return f"{table}\n\n[Report]({ARTIFACTS_PLACEHOLDER}evaluation/report.html), or the file `{report}`"


def numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """Returns the report's numbers by metric name, such as ``student/CoLA/matthews``."""
    metrics: dict[str, float] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}/{key}" if key != "scores" else prefix, inner)
        elif value is not None:
            metrics[prefix] = float(value)

    for name, row in (content["rows"] | content["latency_rows"]).items():
        values = {key: value for key, value in row.items() if key not in _NOT_METRICS}
        collect(name, values)
    for name, tasks in content["details"].items():
        for task, detail in tasks.items():
            logged = {key: detail.get(key) for key in ("agreement", "calibration")}
            collect(name, {task: logged})
    for student, tasks in content["devices"].items():
        for task, row in tasks.items():
            collect(f"export/{student}/{task}", {key: row[key] for key in DEVICE_NUMBERS})
    return {_metric_name(name): value for name, value in metrics.items()}


def _metric_name(name: str) -> str:
    """Removes parentheses, and replaces every other character that MLflow does not allow by ``_``."""
    return re.sub(r"[^\w.\- :/]", "_", re.sub(r"[()]", "", name))
