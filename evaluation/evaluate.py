"""Evaluates models: fine-tunes them, measures latency, writes the report's files and tracks them.

Modules that need torch, ONNX or matplotlib are imported within functions: a finished evaluation needs none.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from evaluation.candidates.recipe_rows import TEACHER, Rows
from evaluation.finetuning.scores import Plan, complete
from evaluation.report import content as report
from evaluation.report import mteb, tables, tracked
from evaluation.submission import submission_line, write_submission
from infra.errors import UserError
from infra.files import storage
from infra.settings.recipe import Recipe
from infra.tracking import run as tracking

EXPORT = "export"
"""Folder of the exported fine-tuned students; it has one folder per student."""
WEB = "web"
"""Folder of the page that runs the fine-tuned models in a browser."""
FILES = {"report.json", "report.md", "report.html"}
"""Files without which an evaluation is not complete."""


def evaluate(recipe: Recipe, rows: Rows, plan: Plan, submitted: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the content of report.json, after making the report unless a complete one exists.

    ``submitted``: names of the rows whose GLUE test predictions are zipped when a report is made.
    """
    directory, key = recipe.evaluation_dir, _key(plan, rows, recipe)
    content = _complete_report(plan, directory, key)
    if content is None or plan.unfinished:
        recipe.save(directory)
        with tracking.start_run(recipe, "evaluation") as run:
            content = _make_report(recipe, rows, plan, key, submitted, run)
    return content


def _make_report(
    recipe: Recipe, rows: Rows, plan: Plan, key: str, submitted: Sequence[str], run: tracking.Run
) -> dict[str, Any]:
    """Runs the unfinished jobs, measures latency, writes and tracks all files; returns report.json's content.

    report.json is written last and marks the evaluation as complete.
    """
    from evaluation.devices import recipe_exports

    directory = recipe.evaluation_dir
    tracked.log_data(run, plan, recipe)
    results = complete(plan, recipe.evaluation.workers, partial(tracked.log_score, run))
    histories = {name: read_history(run.directory) for name, run in rows.students.items()}
    content = {"key": key, **report.build(recipe.name, recipe.evaluation, rows, plan, results, histories)}
    content["choices"] = plan.choices()
    content["devices"] = {}
    for name in rows.students:
        jobs = [job for job in plan.chosen if job.candidate.name == name]
        target = storage.join(directory, EXPORT, name)
        content["devices"][name] = recipe_exports.export_all(jobs, plan.splits, results[name], target)
    if recipe.evaluation.export_web:
        content["page"] = _write_page(recipe, content["notes"])
    files = [*write_files(content, directory), *_write_submissions(plan, submitted, directory)]
    for name, result in mteb.results(plan).items():
        storage.publish_json(storage.join(directory, "mteb", name), result)
    report_path = storage.join(directory, "report.json")
    storage.publish_json(report_path, content)
    tracked.track(run, rows, content, [*files, report_path])
    return content


def _write_page(recipe: Recipe, notes: list[str]) -> str | None:
    """Writes the page that runs the fine-tuned models in a browser; returns its path within ``evaluation/``.
    If it cannot be written, for example without Node, adds the reason to ``notes`` and returns None."""
    from evaluation.export_run import models_of_recipe
    from evaluation.web.page_bundle import built_page
    from evaluation.web.site import add_to_site

    try:
        add_to_site(storage.join(recipe.evaluation_dir, WEB), built_page(), models_of_recipe(recipe))
    except UserError as problem:
        notes.append(f"no page for browsers: {problem}")
        return None
    return f"{WEB}/index.html"


def _write_submissions(plan: Plan, names: Sequence[str], directory: str) -> list[str]:
    """Writes a zip of GLUE test predictions for each of these rows; returns the paths of the zips."""
    written = []
    for name in names:
        target = storage.join(directory, f"submission-{name}.zip")
        files = write_submission(plan, name, target)
        print(submission_line(target, files), flush=True)
        written += [target] if files else []
    return written


def _key(plan: Plan, rows: Rows, recipe: Recipe) -> str:
    """Returns the digest of everything on which the report depends. If it changes, a new report is made."""
    content = {
        "runs": [[job.path, job.key(plan.splits[job.task_name])] for job in plan.jobs],
        "metrics": {name: [task.metrics, task.main_metrics] for name, task in plan.tasks.items()},
        "tests": plan.test_digests,
        "weights": {candidate.name: candidate.digest() for candidate in rows.candidates},
        "notes": rows.notes,
        "references": rows.references,
        "timings": report.timing_key(recipe.evaluation),
        "form": report.KEYS_VERSION,
        **({"web": True} if recipe.evaluation.export_web else {}),
    }
    return storage.digest_bytes(json.dumps(content, sort_keys=True).encode())


def _complete_report(plan: Plan, directory: str, key: str) -> dict[str, Any] | None:
    """Returns the content of report.json if all FILES exist and its key is ``key``; else None."""
    if not set(storage.list_names(directory)) >= FILES:
        return None
    content = storage.read_object(storage.join(directory, "report.json"))
    if content.get("key") != key:
        return None
    # The file's keys are sorted; here rows and tasks get the plan's order again.
    names = list(dict.fromkeys(job.candidate.name for job in plan.jobs))
    tasks = list(dict.fromkeys(job.task_name for job in plan.jobs))
    content["rows"] = {name: content["rows"][name] for name in names}
    for row in content["rows"].values():
        row["scores"] = {task: row["scores"][task] for task in tasks if task in row["scores"]}
    return content


def write_files(content: dict[str, Any], directory: str) -> list[str]:
    """Writes plots, report.md and report.html; returns their paths."""
    from evaluation.report import page, plots

    images = {"score_latency.png": plots.score_against_latency(content)}
    if TEACHER in content["rows"]:
        images = {"retention.png": plots.retention(content), **images}
    curves = plots.loss_curves(content["curves"])
    if curves is not None:
        images["loss_curves.png"] = curves
    markdown, html = tables.to_markdown(content, list(images)), page.to_html(content)
    files = images | {"report.md": markdown.encode(), "report.html": html.encode()}
    for name, data in files.items():
        storage.publish_bytes(storage.join(directory, name), data)
    return [storage.join(directory, name) for name in files]


def read_history(directory: str) -> list[dict[str, Any]]:
    """Returns the valid lines of history.jsonl in a student's directory; [] if there is no such file."""
    path = storage.join(directory, "history.jsonl")
    if not storage.exists(path):
        return []
    lines = []
    for line in storage.read_bytes(path).decode("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]
