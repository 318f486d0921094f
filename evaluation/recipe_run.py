"""Evaluation of a recipe: its rows (``recipe_rows``), their latency, the report, tracking.

What needs torch, ONNX or matplotlib is imported where it is used: a finished evaluation needs none of it.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from evaluation.devices.timed_rows import as_json, latency_part, latency_texts, measure_latency
from evaluation.finetuning.scores import (
    Plan,
    Results,
    complete,
    estimates,
    macro,
    medians,
    prepare,
    write_submission,
)
from evaluation.models import body_parameters, weight_bytes
from evaluation.recipe_rows import TEACHER, Rows, rows_of
from evaluation.report import tables
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.files import storage
from infra.settings.recipe import Recipe
from infra.tracking import run as tracking

EXPORT = "export"
"""Folder of the exported fine-tuned students, one folder a student in it."""


def run_recipe(recipe: Recipe, predict_test: bool = False) -> int:
    """Evaluates the recipe's teacher and students and writes ``evaluation/``, without repeating finished
    work.

    Returns the exit code: EXIT_INCOMPLETE if a student is not trained yet; the report then lacks it.
    """
    directory = recipe.evaluation_dir
    with contextlib.ExitStack() as stack:
        rows = rows_of(recipe, stack)
        plan = prepare(
            rows.candidates,
            recipe.evaluation,
            storage.join(directory, "scores"),
            keep_models=(TEACHER, *rows.students),
            predict_test=predict_test,
        )
        key = _key(plan, rows, recipe)
        content = _complete_report(plan, directory, key)
        if content is None or plan.left:
            recipe.save(directory)
            with tracking.start_run(recipe, "evaluation") as run:
                content = _evaluate(recipe, rows, plan, key, run)
    print(tables.summary_table(content))
    for note in content["notes"]:
        print(f"note: {note}")
    print(storage.join(directory, "report.md"))
    return EXIT_INCOMPLETE if rows.untrained else 0


def _evaluate(recipe: Recipe, rows: Rows, plan: Plan, key: str, run: tracking.Run) -> dict[str, Any]:
    """Runs, latency, files, tracking. report.json is written last and marks the evaluation as complete."""
    from evaluation.devices import exports

    directory = recipe.evaluation_dir
    results = complete(plan, recipe.evaluation.workers)
    content = build_report(recipe, rows, results, key)
    tables.add_comparisons(content["rows"], *estimates(plan))
    content["devices"] = {
        name: exports.export_all(
            [job for job in plan.jobs if job.candidate.name == name],
            plan.splits,
            results[name],
            storage.join(directory, EXPORT, name),
        )
        for name in rows.students
    }
    files = [*write_files(rows, content, directory), *_write_submissions(rows, plan, results, directory)]
    track(run, rows, content)
    report_path = storage.join(directory, "report.json")
    storage.publish_json(report_path, content)
    for file in (*files, report_path):
        if not storage.is_remote(file):
            run.log_artifact(file, "evaluation")
    return content


def _write_submissions(rows: Rows, plan: Plan, results: Results, directory: str) -> list[str]:
    """GLUE's test predictions of every student where they were asked for; the zip files written."""
    written = []
    for one in rows.candidates:
        target = storage.join(directory, f"submission-{one.name}.zip")
        asked = one.name in rows.students and any(job.predict_test for job in plan.jobs)
        if asked and write_submission(one, results, plan.jobs[0].scores, target):
            written.append(target)
    return written


def _key(plan: Plan, rows: Rows, recipe: Recipe) -> str:
    """Digest of everything the report's numbers depend on."""
    content = {
        "runs": [[job.path, job.key(plan.splits[job.task_name])] for job in plan.jobs],
        "weights": {candidate.name: candidate.digest() for candidate in rows.candidates},
        "notes": rows.notes,
        "latency": [
            recipe.evaluation.latency_sentences,
            recipe.evaluation.latency_threads,
            recipe.evaluation.elmo_reference,
            latency_part(recipe.evaluation)[0].name,
        ],
    }
    return storage.digest_bytes(json.dumps(content, sort_keys=True).encode())


def _complete_report(plan: Plan, directory: str, key: str) -> dict[str, Any] | None:
    """The content of report.json if its key is the same and all other files exist; else None."""
    names = storage.list_names(directory)
    if not {"report.json", "report.md"} <= set(names):
        return None
    try:
        content = storage.read_json(storage.join(directory, "report.json"))
    except UserError:
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    names_in_order = list(dict.fromkeys(job.candidate.name for job in plan.jobs))  # the file is sorted
    tasks = list(dict.fromkeys(job.task_name for job in plan.jobs))
    content["rows"] = {name: content["rows"][name] for name in names_in_order}
    for row in content["rows"].values():
        row["scores"] = {task: row["scores"][task] for task in tasks}
    return content


def build_report(recipe: Recipe, rows: Rows, results: Results, key: str) -> dict[str, Any]:
    """The content of report.json, but for comparisons and devices."""
    settings = recipe.evaluation
    timed = [one for one in rows.candidates if one.name == TEACHER or one.name in rows.students]
    texts, label = latency_texts(settings)
    times, references = measure_latency(timed, settings, texts)
    found: dict[str, dict[str, Any]] = {}
    for one in rows.candidates:
        scores = {task: medians(seeds) for task, seeds in results[one.name].items()}
        found[one.name] = {
            "student": one.student,
            "undistilled": rows.undistilled.get(one.student or "") if not one.random_weights else None,
            "scores": scores,
            "seed_scores": {
                task: {str(run["seed"]): run["score"] for run in seeds}
                for task, seeds in results[one.name].items()
            },
            "macro": macro({task: values["score"] for task, values in scores.items()}),
            "parameters": body_parameters(one.directory),
            "bytes": weight_bytes(one.directory),
            "latency": as_json(times[one.student or one.name]),  # one architecture, one latency
        }
    runs = (run for tasks in results.values() for seeds in tasks.values() for run in seeds)
    return {
        "key": key,
        "recipe": recipe.name,
        "students": list(rows.students),
        "seeds": list(settings.seeds),
        "settings": recipe.outcome("evaluation")["evaluation"],
        "latency_setting": {
            "texts": label,
            "sentences": len(texts),
            "threads": settings.latency_threads,
            "device": "cpu",
        },
        "rows": found,
        "latency_rows": references,
        "notes": list(dict.fromkeys([*rows.notes, *(note for run in runs for note in run["notes"])])),
        "paper": tables.PAPER,
    }


def write_files(rows: Rows, content: dict[str, Any], directory: str) -> list[str]:
    """Plots and report.md; the paths written."""
    from evaluation.report import plots

    images = {"score_latency.png": plots.score_against_latency(content)}
    if TEACHER in content["rows"]:
        images = {"retention.png": plots.retention(content), **images}
    histories = {
        name: read_history(storage.join(run.directory, "history.jsonl"))
        for name, run in rows.students.items()
    }
    curves = plots.loss_curves(histories)
    if curves is not None:
        images["loss_curves.png"] = curves
    files = {**images, "report.md": tables.to_markdown(content, list(images)).encode()}
    for name, data in files.items():
        storage.publish_bytes(storage.join(directory, name), data)
    return [storage.join(directory, name) for name in files]


def read_history(path: str) -> list[dict[str, Any]]:
    """The lines of history.jsonl that can be read; [] without the file."""
    if not storage.exists(path):
        return []
    lines = []
    for line in storage.read_bytes(path).decode("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def track(run: tracking.Run, rows: Rows, content: dict[str, Any]) -> None:
    """Every number of the report, and each student as a registered version with its score."""
    run.log_metrics(numbers(content))
    for one in rows.candidates:
        if one.name not in rows.students:
            continue
        student, row = rows.students[one.name], content["rows"][one.name]
        folder = f"models/{one.name}" if student.recipe.students else "model"
        tags = {"macro": f"{row['macro']:.6f}", "tasks": ",".join(sorted(row["scores"]))}
        run.register_model(
            one.directory, student.registered_name, alias="best", tags=tags, score="macro", folder=folder
        )


def numbers(content: dict[str, Any]) -> dict[str, float]:
    """``student/CoLA/matthews``, ``teacher/latency/p50_ms``, ... of the report's rows."""
    from evaluation.devices.exports import NUMBERS

    found: dict[str, float] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}/{key}" if key != "scores" else prefix, inner)
        elif value is not None:
            found[prefix] = float(value)

    for name, row in (content["rows"] | content["latency_rows"]).items():
        values = {key: value for key, value in row.items() if key not in ("student", "undistilled")}
        collect(name.replace("(", "").replace(")", ""), values)  # MLflow takes no brackets
    for student, tasks in content["devices"].items():
        for task, row in tasks.items():
            collect(f"export/{student}/{task}", {key: row[key] for key in NUMBERS})
    return found
