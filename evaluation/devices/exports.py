"""A recipe's students on devices: exports of its fine-tuned models, the score lost to int8, rows to time."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.devices import elmo, latency
from evaluation.devices.export import export, export_model
from evaluation.devices.exported import FLOAT32, INT8
from evaluation.devices.latency import Inputs, Runner
from evaluation.devices.onnx_model import OnnxModel, open_session, session_runner
from evaluation.finetuning import finetune
from evaluation.finetuning.jobs import MODEL, Job, median_seed
from evaluation.kinds.table import kind_of
from evaluation.measures import predictions
from evaluation.models import Candidate, load_model, load_tokenizer, parameters, weight_bytes
from evaluation.tasks.catalogue import find_task
from evaluation.tasks.task import Split
from infra import console
from infra.files import storage
from infra.settings.sections import Evaluation

PREDICTIONS = "int8.predictions.parquet"
"""The int8 model's answers, from which its score is computed."""


def export_all(
    jobs: Sequence[Job],
    splits: Mapping[str, Mapping[str, Split]],
    results: Mapping[str, list[dict[str, Any]]],
    directory: str,
) -> dict[str, dict[str, Any]]:
    """Export the kept model of every task to ``directory/<task>``; rows of ``report.json: devices``.

    ``int8_lost`` is the difference between the model's dev scores in torch and in int8.
    """
    rows = {}
    first = {job.task_name: job for job in reversed(jobs) if kind_of(job.task).device}
    with console.progress(len(first), "tasks", "export") as shown:
        for task_name in (name for name in results if name in first):
            job = first[task_name]
            rows[task_name] = export_task(job, splits[task_name], results[task_name], directory)
            shown.advance(1)
    return rows


def export_task(
    job: Job, splits: Mapping[str, Split], results: list[dict[str, Any]], directory: str
) -> dict[str, Any]:
    source, target = storage.join(job.task_directory, MODEL), storage.join(directory, job.task_name)
    seed = median_seed(results)
    score = next(float(result["score"]) for result in results if result["seed"] == seed)
    with tempfile.TemporaryDirectory() as draft:
        local = _local(source, os.path.join(draft, "model"))
        summary = export(local, target)
        graph = _local(target, os.path.join(draft, "export"))
        model = OnnxModel(open_session(os.path.join(graph, INT8), job.settings.latency_threads))
        tokenizer, length = load_tokenizer(local), job.setting.max_length
        answers = {
            part: finetune.answers(model, tokenizer, job.task, splits[part], length, "float32")
            for part in job.task.scored_parts
        }
    predictions.publish(storage.join(target, PREDICTIONS), job.task, answers)
    metrics = predictions.score(job.task, answers)
    int8_score = predictions.task_score(job.task, metrics)
    kept = {key: summary[key] for key in ("kind", "bytes", "int8_size_ratio", "difference")}
    return kept | {
        "seed": seed,
        "score": score,
        "int8_score": int8_score,
        "int8_lost": score - int8_score,
        "int8_metrics": metrics,
    }


def _local(directory: str, copy: str) -> str:
    """The directory itself, or where it is remote a copy of its files."""
    if not storage.is_remote(directory):
        return directory
    for name in storage.list_names(directory):
        storage.publish_bytes(os.path.join(copy, name), storage.read_bytes(storage.join(directory, name)))
    return copy


@dataclass(frozen=True)
class TimedRow:
    """A row that is timed but not fine-tuned."""

    runner: Runner
    inputs: dict[int, list[Inputs]]
    """Batch size -> batches."""
    parameters: int
    bytes: int | None


def onnx_rows(
    student: Candidate, settings: Evaluation, inputs: dict[int, list[Inputs]]
) -> dict[str, TimedRow]:
    """The student with an STS-B head in ONNX, float32 and int8."""
    model = load_model(student, find_task("STS-B"), seed=0).eval()
    model.set_attn_implementation("eager")
    rows, count = {}, parameters(model)
    with tempfile.TemporaryDirectory() as draft:
        sizes = export_model(model, draft, student.directory)["bytes"]
        for name, file in (("fp32", FLOAT32), ("int8", INT8)):
            session = open_session(os.path.join(draft, file), settings.latency_threads)
            runner = session_runner(session)
            rows[f"{student.name} ONNX {name}"] = TimedRow(runner, inputs, count, sizes[file])
    return rows


def gpu_row(candidate: Candidate, model: Any, inputs: dict[int, list[Inputs]]) -> dict[str, TimedRow]:
    """A copy of the model on the GPU; {} without one."""
    if not torch.cuda.is_available():
        return {}
    runner = latency.torch_runner(copy.deepcopy(model), "cuda")
    size = weight_bytes(candidate.directory)
    return {f"{candidate.name} GPU": TimedRow(runner, inputs, parameters(model), size)}


def elmo_row(settings: Evaluation, texts: Sequence[tuple[str, ...]]) -> TimedRow:
    """A network of ELMo's size, with random weights."""
    network = elmo.build()
    by_size = {size: elmo.batches(texts, size, settings.max_length) for size in (1, *latency.BATCH_SIZES)}
    return TimedRow(elmo.runner(network), by_size, elmo.parameters(network), None)
