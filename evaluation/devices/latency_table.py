"""Chooses the texts for a report's latency table, and measures the latency of every model in it.

torch and ONNX are imported within functions, so that a finished evaluation loads neither.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from evaluation.candidates.models import Candidate, load_config, load_model, load_tokenizer
from evaluation.sources.catalogue import find_task, find_tasks
from evaluation.sources.loading import has_part, load
from evaluation.tasks.task import Task
from infra import console
from infra.settings.sections import Evaluation
from offline_teacher.families.positions import usable_length

if TYPE_CHECKING:
    from evaluation.devices.latency import Latency


def measure_latency(
    candidates: Sequence[Candidate], settings: Evaluation, texts: list[tuple[str, ...]]
) -> tuple[dict[str, Latency], dict[str, int], dict[str, dict[str, Any]]]:
    """Times the candidates in torch, each with an untrained STS-B head, and further models, on ``texts``.

    Further models are every student in ONNX, every candidate on a GPU if there is one, and a network of
    ELMo's size. Returns three dicts: candidate -> latency; candidate -> bytes of peak memory at the largest
    batch size; and ``report.json: latency_rows``, an entry per further model.
    """
    from evaluation.devices import elmo, latency, timed_models
    from evaluation.devices.memory import peak_memory

    task = find_task("STS-B")
    runners, inputs, memory = {}, {}, {}
    further: dict[str, timed_models.TimedModel] = {}
    for candidate in candidates:
        name, tokenizer = candidate.name, load_tokenizer(candidate.directory)
        length = min(settings.max_length, usable_length(load_config(candidate.directory)))
        model = load_model(candidate, task, seed=0).eval()
        runners[name] = latency.torch_runner(model)
        sizes = (1, *latency.BATCH_SIZES)
        inputs[name] = {size: latency.batches(tokenizer, texts, size, length) for size in sizes}
        memory[name] = peak_memory(model, inputs[name][sizes[-1]][0])
        if candidate.student is not None:
            further |= timed_models.onnx_models(candidate, settings, inputs[name])
        further |= timed_models.gpu_model(candidate, model, inputs[name])
    if settings.elmo_reference:
        further[elmo.LABEL] = timed_models.elmo_model(settings, texts)
    runners |= {name: timed.runner for name, timed in further.items()}
    inputs |= {name: timed.inputs for name, timed in further.items()}
    sentences = len(texts) * len(runners) * (1 + len(latency.BATCH_SIZES))
    with console.progress(sentences, "sentences", "latency") as shown:
        latencies = latency.measure(runners, inputs, settings.latency_threads, shown.advance)
    rows = {
        name: {"parameters": timed.parameters, "bytes": timed.bytes, "latency": as_json(latencies[name])}
        for name, timed in further.items()
    }
    return {candidate.name: latencies[candidate.name] for candidate in candidates}, memory, rows


def as_json(measured: Latency) -> dict[str, Any]:
    """Returns the latency in the form of report.json, where batch sizes, as keys, are strings."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(measured)))
    return values


def latency_texts(settings: Evaluation) -> tuple[list[tuple[str, ...]], str]:
    """Returns the texts on which models are timed, and the name of these texts in the report."""
    task, part = latency_part(settings)
    split = load(task, part, settings.data)
    texts: list[tuple[str, ...]] = [(item.question, item.context) for item in split.questions] or split.texts
    if task.kind == "tokens":
        texts = [(" ".join(words),) for words in texts]
    timed = texts[: settings.latency_sentences or None]
    label = f"{task.name} {part.partition('_')[0]}"
    return timed, label if len(timed) == len(texts) else f"first {len(timed):,} of {label}"


def latency_part(settings: Evaluation) -> tuple[Task, str]:
    """Returns the task and split whose texts are timed.

    They are STS-B dev if its file exists or ``evaluation.tasks`` names STS-B, else the first task's first
    scored split.
    """
    tasks = find_tasks(settings.tasks)
    sts_b = find_task("STS-B")
    wanted = settings.data is not None or sts_b.name in [task.name for task in tasks]
    if wanted and has_part(sts_b, "dev", settings.data):
        return sts_b, "dev"
    return tasks[0], tasks[0].scored_parts[0]
