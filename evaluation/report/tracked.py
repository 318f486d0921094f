"""What the tracking run gets: the store and the data, the scores of seeds while they finish, and then the
report: its numbers, the headline, files, students with their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.finetuning.jobs import Job
from evaluation.finetuning.scores import Plan
from evaluation.recipe_rows import TEACHER, Rows
from evaluation.report import tables
from evaluation.tasks.loading import place_of
from infra.files import storage
from infra.settings.recipe import Recipe
from infra.tracking.mlflow_server import ARTIFACTS
from infra.tracking.run import Run
from offline_teacher.store.paths import MANIFEST
from offline_teacher.store.reader import open_store

DEVICE_NUMBERS = ("score", "int8_score", "int8_lost", "bytes", "int8_size_ratio", "difference")
"""The keys of a task's row on devices whose values are numbers or tables of numbers."""
_LEFT_OUT = ("student", "references", "best_reference", "seed_scores", "differences")
"""The keys of a row that do not become metrics. Some are no numbers. The seeds' scores are points of nested
runs, and the paired differences are in the report."""


def log_data(run: Run, plan: Plan, recipe: Recipe) -> None:
    """Logs the recipe's store, if it is finished, and every part of every task as data sets. The digest of a
    part is the one in the keys of saved scores."""
    if storage.exists(storage.join(recipe.store_path, MANIFEST)):
        run.log_store(recipe.store_path, open_store(recipe.store_path).digest)
    for name, parts in plan.splits.items():
        for part, split in parts.items():
            context = "training" if part == "train" else "evaluation"
            place = place_of(plan.tasks[name], part, recipe.evaluation.data)
            run.log_dataset(f"{name} {part}", place, split.digest(), context)


def log_score(run: Run, job: Job, result: Mapping[str, Any]) -> None:
    """The score of one seed, in the run of its model, task and setting."""
    name = "/".join(filter(None, (job.candidate.name, job.task_name, job.folder)))
    values = {key: result[key] for key in ("score", "dev_score")} | result["metrics"]
    if result["train"]:
        values |= {f"train/{key}": result["train"][key] for key in ("loss", "rows_per_second")}
    run.log_child(name, values, job.seed, {"model": job.candidate.name, "task": job.task_name})


def track(run: Run, rows: Rows, content: dict[str, Any], files: Sequence[str]) -> None:
    """Logs the report; each student becomes a registered version with its score."""
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
        values |= {f"score/{task}": found["score"] for task, found in row["scores"].items()}
        run.register_model(
            one.directory, rows.students[one.name].registered_name, alias="best", tags=tags, score="macro",
            scores=values, note=note,
        )  # fmt: skip
    run.log_headline(headline(content, rows.kl), note)


def headline(content: Mapping[str, Any], kl: Mapping[str, float]) -> dict[str, float]:
    """The numbers by which recipes are compared: of the best student, and of each of several by name.

    Where no row is a student, all rows but the teacher are compared.
    """
    names = content["students"] or [name for name in content["rows"] if name != TEACHER] or [TEACHER]
    best = max(names, key=lambda name: content["rows"][name]["macro"])
    found = headline_of(content, best, kl.get(best))
    if len(names) > 1:
        for name in names:
            found |= {
                f"{name}/{key}": value for key, value in headline_of(content, name, kl.get(name)).items()
            }
    return found


def headline_of(content: Mapping[str, Any], name: str, kl: float | None) -> dict[str, float]:
    """The headline numbers of one student; numbers that are not known are left out."""
    row = content["rows"][name]
    found = {key: row[key] for key in ("macro", "retention", "gap_closed", "gap_closed_best")}
    found |= {"kl": kl, "megabytes": row["bytes"] / 1e6, "p50_ms": row["latency"]["p50_ms"]}
    return {key: float(value) for key, value in found.items() if value is not None}


def description(content: Mapping[str, Any], report: str) -> str:
    """Describes the recipe's run and each version, in Markdown: the models' table, a link to the report."""
    table = tables.markdown_table(*tables.overview_rows(content))
    return f"{table}\n\n[Report]({ARTIFACTS}evaluation/report.html), or the file `{report}`"


def numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """``student/CoLA/matthews``, ``teacher/latency/p50_ms``, ... of the report's rows."""
    found: dict[str, float] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}/{key}" if key != "scores" else prefix, inner)
        elif value is not None:
            found[prefix] = float(value)

    for name, row in (content["rows"] | content["latency_rows"]).items():
        values = {key: value for key, value in row.items() if key not in _LEFT_OUT}
        collect(_taken(name), values)
    for name, tasks in content["details"].items():
        for task, one in tasks.items():
            collect(_taken(name), {task: {key: one.get(key) for key in ("agreement", "calibration")}})
    for student, tasks in content["devices"].items():
        for task, row in tasks.items():
            collect(f"export/{student}/{task}", {key: row[key] for key in DEVICE_NUMBERS})
    return found


def _taken(name: str) -> str:
    """MLflow takes no brackets."""
    return name.replace("(", "").replace(")", "")
