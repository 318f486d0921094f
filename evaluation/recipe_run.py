"""Evaluation of a recipe: teacher, student and undistilled student, their latency, the report, tracking.

What needs torch, ONNX or matplotlib is imported where it is used: a finished evaluation needs none of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from evaluation import report
from evaluation.models import (
    Candidate,
    body_parameters,
    load_config,
    load_model,
    load_tokenizer,
    local_directory,
    weight_bytes,
)
from evaluation.report import STUDENT, TEACHER, UNDISTILLED
from evaluation.scores import Plan, Results, complete, estimates, macro, medians, prepare, write_submission
from evaluation.tasks import Task, find_task, find_tasks, has_part, load
from infra import console, storage, tracking
from infra.errors import UserError
from infra.recipe import Recipe
from infra.sections import Evaluation
from offline_teacher.families.positions import usable_length

if TYPE_CHECKING:
    from evaluation.latency import Latency

TAUGHT = "student (D)"
"""The student after a second distillation, as the paper names it."""
EXPORT = "export"
"""Folder of the exported fine-tuned students."""


def run_recipe(recipe: Recipe, predict_test: bool = False) -> int:
    """Evaluate what the recipe made and write ``evaluation/``, nothing twice; the exit code."""
    student = storage.join(recipe.student_dir, "model")
    directory = recipe.evaluation_dir
    with contextlib.ExitStack() as stack:
        teacher_dir = stack.enter_context(local_directory(recipe.teacher.model, recipe.teacher.revision))
        student_dir = stack.enter_context(local_directory(path_not_name(student)))
        candidates = [Candidate(TEACHER, teacher_dir), Candidate(STUDENT, student_dir)]
        if recipe.evaluation.second_distillation:
            candidates.append(Candidate(TAUGHT, student_dir, taught_by=TEACHER))
        if recipe.evaluation.undistilled:
            candidates.append(Candidate(UNDISTILLED, student_dir, random_weights=True))
        plan = prepare(
            candidates,
            recipe.evaluation,
            storage.join(directory, "scores"),
            keep_models=(TEACHER, STUDENT),
            predict_test=predict_test,
        )
        key = _key(plan, candidates, recipe)
        content = _complete_report(plan, directory, key)
        if content is None or plan.left:
            recipe.save(directory)
            with tracking.start_run(recipe, "evaluation") as run:
                content = _evaluate(recipe, candidates, plan, key, run)
    print(report.summary_table(content))
    for note in content["notes"]:
        print(f"note: {note}")
    print(storage.join(directory, "report.md"))
    return 0


def _evaluate(
    recipe: Recipe, candidates: Sequence[Candidate], plan: Plan, key: str, run: tracking.Run
) -> dict[str, Any]:
    """Runs, latency, files, tracking. report.json comes last: it says that all the rest is there."""
    from evaluation import devices

    directory = recipe.evaluation_dir
    results = complete(plan, recipe.evaluation.workers)
    content = build_report(recipe, candidates, results, key)
    report.add_comparisons(content["rows"], *estimates(plan))
    student_jobs = [job for job in plan.jobs if job.candidate.name == STUDENT]
    content["devices"] = devices.export_all(
        student_jobs, plan.splits, results[STUDENT], storage.join(directory, EXPORT)
    )
    files = write_files(recipe, content, directory)
    if any(job.predict_test for job in plan.jobs):
        target = storage.join(directory, "submission.zip")
        if write_submission(candidates[1], results, plan.jobs[0].scores, target):
            files.append(target)
    track(run, recipe, content, candidates[1].directory)
    report_path = storage.join(directory, "report.json")
    storage.publish_json(report_path, content)
    for file in (*files, report_path):
        if not storage.is_remote(file):
            run.log_artifact(file, "evaluation")
    return content


def path_not_name(path: str) -> str:
    """A relative local path marked as one, so that it is not taken for a hub name."""
    return path if storage.is_remote(path) or path.startswith(("/", ".")) else f"./{path}"


def _key(plan: Plan, candidates: Sequence[Candidate], recipe: Recipe) -> str:
    """Digest of everything the report's numbers depend on."""
    content = {
        "runs": [[job.path, job.key(plan.splits[job.task_name])] for job in plan.jobs],
        "weights": {candidate.name: candidate.digest() for candidate in candidates},
        "latency": [
            recipe.evaluation.latency_sentences,
            recipe.evaluation.latency_threads,
            recipe.evaluation.elmo_reference,
            latency_part(recipe.evaluation)[0].name,
        ],
    }
    return storage.digest_bytes(json.dumps(content, sort_keys=True).encode())


def _complete_report(plan: Plan, directory: str, key: str) -> dict[str, Any] | None:
    """report.json where it is there under the same key and so is all that is written before it."""
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


def build_report(
    recipe: Recipe, candidates: Sequence[Candidate], results: Results, key: str
) -> dict[str, Any]:
    """The content of report.json."""
    settings = recipe.evaluation
    timed = [one for one in candidates if not one.random_weights and one.taught_by is None]
    texts, label = latency_texts(settings)
    times, references = measure_latency(timed, settings, texts)
    rows: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        scores = {task: medians(seeds) for task, seeds in results[candidate.name].items()}
        measured = times.get(candidate.name, times[STUDENT])  # the others have the student's architecture
        rows[candidate.name] = {
            "scores": scores,
            "seed_scores": {
                task: {str(one["seed"]): one["score"] for one in seeds}
                for task, seeds in results[candidate.name].items()
            },
            "macro": macro({task: values["score"] for task, values in scores.items()}),
            "parameters": body_parameters(candidate.directory),
            "bytes": weight_bytes(candidate.directory),
            "latency": json.loads(json.dumps(asdict(measured))),
        }
    every = (
        note
        for tasks in results.values()
        for seeds in tasks.values()
        for one in seeds
        for note in one["notes"]
    )
    return {
        "key": key,
        "recipe": recipe.name,
        "seeds": list(settings.seeds),
        "settings": recipe.outcome("evaluation")["evaluation"],
        "latency_setting": {
            "texts": label,
            "sentences": len(texts),
            "threads": settings.latency_threads,
            "device": "cpu",
        },
        "rows": rows,
        "latency_rows": references,
        "notes": list(dict.fromkeys(every)),
        "paper": report.PAPER,
    }


def measure_latency(
    candidates: Sequence[Candidate], settings: Evaluation, texts: list[tuple[str, ...]]
) -> tuple[dict[str, Latency], dict[str, dict[str, Any]]]:
    """Latency of each candidate with an STS-B head, and the rows that are only timed."""
    from evaluation import devices, latency

    task = find_task("STS-B")
    runners, inputs = {}, {}
    for candidate in candidates:
        tokenizer = load_tokenizer(candidate.directory)
        length = min(settings.max_length, usable_length(load_config(candidate.directory)))
        runners[candidate.name] = latency.torch_runner(load_model(candidate, task, seed=0))
        sizes = (1, *latency.BATCH_SIZES)
        inputs[candidate.name] = {
            size: latency.batches(tokenizer, texts, size, length) for size in sizes
        }  # fmt: skip
    student = next(one for one in candidates if one.name == STUDENT)
    extra = devices.latency_rows(student, settings, texts, inputs[STUDENT])
    runners |= {name: row.runner for name, row in extra.items()}
    inputs |= {name: row.inputs for name, row in extra.items()}
    sentences = len(texts) * len(runners) * (1 + len(latency.BATCH_SIZES))
    with console.progress(sentences, "sentences", "latency") as shown:
        times = latency.measure(runners, inputs, settings.latency_threads, shown.advance)
    rows = {
        name: {
            "parameters": row.parameters,
            "bytes": row.bytes,
            "latency": json.loads(json.dumps(asdict(times[name]))),
        }
        for name, row in extra.items()
    }
    return {one.name: times[one.name] for one in candidates}, rows


def latency_texts(settings: Evaluation) -> tuple[list[tuple[str, ...]], str]:
    """What the models are timed on, and what to call it."""
    task, part = latency_part(settings)
    texts = load(task, part, settings.data).texts
    timed = texts[: settings.latency_sentences or None]
    label = f"{task.name} dev"
    return timed, label if len(timed) == len(texts) else f"first {len(timed):,} of {label}"


def latency_part(settings: Evaluation) -> tuple[Task, str]:
    """STS-B dev; where its file is not there, the dev set of the first task that has texts."""
    tasks: list[Task] = [
        find_task("STS-B"),
        *(task for task in find_tasks(settings.tasks) if task.kind != "spans"),
    ]
    for task in tasks:
        if has_part(task, task.dev_parts[0], settings.data):
            return task, task.dev_parts[0]
    raise UserError(f"latency: {settings.data} has no STS-B/dev.tsv to time the models on")


def write_files(recipe: Recipe, content: dict[str, Any], directory: str) -> list[str]:
    """Plots and report.md; the paths written."""
    from evaluation import plots

    images = {
        "retention.png": plots.retention(content),
        "score_latency.png": plots.score_against_latency(content),
    }
    curves = plots.loss_curves(read_history(storage.join(recipe.student_dir, "history.jsonl")))
    if curves is not None:
        images["loss_curves.png"] = curves
    files = {**images, "report.md": report.to_markdown(content, list(images)).encode()}
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


def track(run: tracking.Run, recipe: Recipe, content: dict[str, Any], student_dir: str) -> None:
    """Every number of the report, and the student as a registered version with its score."""
    run.log_metrics(numbers(content))
    name = recipe.tracking.model_name or recipe.name
    macro_text = f"{content['rows'][STUDENT]['macro']:.6f}"
    tags = {"macro": macro_text, "tasks": ",".join(sorted(content["rows"][STUDENT]["scores"]))}
    run.register_model(student_dir, name, alias="best", tags=tags, score="macro")


def numbers(content: dict[str, Any]) -> dict[str, float]:
    """``student/CoLA/matthews``, ``teacher/latency/p50_ms``, ... of the report's rows."""
    from evaluation.devices import NUMBERS

    found: dict[str, float] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}/{key}" if key != "scores" else prefix, inner)
        elif value is not None:
            found[prefix] = float(value)

    for name, row in (content["rows"] | content["latency_rows"]).items():
        collect(name.replace("(", "").replace(")", ""), row)  # MLflow takes no brackets
    for task, row in content["devices"].items():
        collect(f"export/{task}", {key: row[key] for key in NUMBERS})
    return found
