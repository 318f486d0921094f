"""Exports a student's fine-tuned models to ONNX, and scores the int8 files on each task's scored splits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from evaluation.candidates.models import load_tokenizer, local_directory
from evaluation.devices.export import export
from evaluation.devices.export_files import INT8
from evaluation.devices.onnx_model import OnnxModel, open_session
from evaluation.finetuning import finetune
from evaluation.finetuning.jobs import MODEL, Job, median_seed
from evaluation.kinds import predictions
from evaluation.kinds.registry import kind_of
from evaluation.tasks.task import Split
from infra import console
from infra.files import storage

PREDICTIONS = "int8.predictions.parquet"
"""Name of the file with the int8 model's predictions, from which its score is computed."""


def export_all(
    jobs: Sequence[Job],
    splits: Mapping[str, Mapping[str, Split]],
    results: Mapping[str, list[dict[str, Any]]],
    directory: str,
) -> dict[str, dict[str, Any]]:
    """Exports one student's kept model of each task whose kind is exportable, to ``directory/<task>``.

    Returns task -> what ``export_task`` returns: the entries of ``report.json: devices.<student>``. ``jobs``:
    the student's chosen jobs. ``results``: task -> content of its score files, one per seed.
    """
    entries = {}
    exportable = [job for job in jobs if kind_of(job.task).exportable]
    job_of = {job.task_name: job for job in reversed(exportable)}  # the first job of each task
    with console.progress(len(job_of), "tasks", "export") as shown:
        for task_name in (name for name in results if name in job_of):
            job = job_of[task_name]
            entries[task_name] = export_task(job, splits[task_name], results[task_name], directory)
            shown.advance(1)
    return entries


def export_task(
    job: Job, splits: Mapping[str, Split], results: list[dict[str, Any]], directory: str
) -> dict[str, Any]:
    """Exports the median seed's model of one task, and scores its int8 file. ``job``: of any seed.

    Returns kind, bytes, int8_size_ratio and difference as in export.json; ``seed``, ``score`` (torch model),
    ``int8_score``, ``int8_metrics`` (ONNX file), ``int8_lost`` = score - int8_score. Scores are fractions.
    """
    source, target = storage.join(job.task_directory, MODEL), storage.join(directory, job.task_name)
    seed = median_seed(results)
    score = next(float(result["score"]) for result in results if result["seed"] == seed)
    with ExitStack() as stack:
        model_directory = stack.enter_context(local_directory(source))
        summary = export(model_directory, target)
        export_directory = stack.enter_context(local_directory(target))
        session = open_session(os.path.join(export_directory, INT8), job.settings.latency_threads)
        model, tokenizer = OnnxModel(session), load_tokenizer(model_directory)
        length = job.hyper_parameters.max_length
        answers = {
            part: finetune.answers(model, tokenizer, job.task, splits[part], length, "float32")
            for part in job.task.scored_parts
        }
    predictions.publish(storage.join(target, PREDICTIONS), job.task, answers)
    metrics = predictions.score(job.task, answers)
    int8_score = predictions.task_score(job.task, metrics)
    exported = {key: summary[key] for key in ("kind", "bytes", "int8_size_ratio", "difference")}
    scores = {"score": score, "int8_score": int8_score, "int8_lost": score - int8_score}
    return exported | scores | {"seed": seed, "int8_metrics": metrics}
