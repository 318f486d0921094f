"""Writes GLUE test predictions as gluebenchmark.com expects them: a zip with one .tsv per test set."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.finetuning.jobs import median_seed
from evaluation.finetuning.scores import Plan
from evaluation.kinds import predictions
from evaluation.sources.catalogue import TEST_FILES
from evaluation.tasks.task import Task
from infra.files import storage


def write_submission(plan: Plan, candidate: str, target: str) -> list[str]:
    """Zips one candidate's test predictions, of its median seeds, into ``target``; returns the file names."""
    files = {}
    for task in plan.tasks.values():
        jobs = [job for job in plan.chosen if (job.candidate.name, job.task_name) == (candidate, task.name)]
        seed = median_seed([plan.result_of(job) for job in jobs])
        job = next(job for job in jobs if job.seed == seed)
        result, path = plan.result_of(job), job.predictions_path
        by_part = predictions.read(path, task, result["predictions"], list(result.get("test_splits", ())))
        for part, answers in by_part.items():
            text = prediction_file(task, answers.ids, predictions.decide(task, answers))
            files[f"{task.parts[part].submission}.tsv"] = text.encode()
    if files:
        storage.publish_bytes(target, zip_bytes(files))
    return sorted(files)


def submission_line(target: str, files: Sequence[str]) -> str:
    """Returns a line about the files in the zip, and about those that the server requires but are missing."""
    missing = [name for name in TEST_FILES if name not in files]
    required = f"; gluebenchmark.com also requires {', '.join(missing)}" if missing else ""
    return f"{target}: {', '.join(files)}{required}" if files else f"{target}: not written, no test files"


def prediction_file(task: Task, index: Sequence[str], predicted: np.ndarray) -> str:
    """Returns lines of index and prediction: the label's name, or a score clipped to the task's range.

    ``predicted``: class ids or scores, [n].
    """
    if task.kind == "regression":
        low, high = map(float, task.labels)
        values = [f"{value:.3f}" for value in np.clip(predicted, low, high)]
    else:
        values = [task.labels[int(value)] for value in predicted]
    lines = ["index\tprediction", *(f"{row}\t{value}" for row, value in zip(index, values, strict=True))]
    return "\n".join(lines) + "\n"


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    """Returns a zip of the files, with a fixed date, so that the same predictions give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
