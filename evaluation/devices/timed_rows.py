"""The models whose latency a recipe's report gives, and the texts on which they are timed.

Functions import torch and ONNX themselves, so that a finished evaluation needs neither.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from evaluation.models import Candidate, load_config, load_model, load_tokenizer
from evaluation.tasks.catalogue import find_task, find_tasks
from evaluation.tasks.loading import has_part, load
from evaluation.tasks.task import Task
from infra import console
from infra.settings.sections import Evaluation
from offline_teacher.families.positions import usable_length

if TYPE_CHECKING:
    from evaluation.devices.latency import Latency


def measure_latency(
    candidates: Sequence[Candidate], settings: Evaluation, texts: list[tuple[str, ...]]
) -> tuple[dict[str, Latency], dict[str, int], dict[str, dict[str, Any]]]:
    """Each candidate's latency (with an STS-B head) and its peak memory at the largest batch size, in
    bytes; and the rows of ``report.json: latency_rows``.

    Those rows are only timed: every student in ONNX, every candidate on a GPU if there is one, and a
    network of ELMo's size.
    """
    from evaluation.devices import elmo, exports, latency
    from evaluation.devices.memory import peak_memory

    task = find_task("STS-B")
    runners, inputs, memory = {}, {}, {}
    extra: dict[str, exports.TimedRow] = {}
    for one in candidates:
        tokenizer = load_tokenizer(one.directory)
        length = min(settings.max_length, usable_length(load_config(one.directory)))
        model = load_model(one, task, seed=0).eval()
        runners[one.name] = latency.torch_runner(model)
        sizes = (1, *latency.BATCH_SIZES)
        inputs[one.name] = {size: latency.batches(tokenizer, texts, size, length) for size in sizes}
        memory[one.name] = peak_memory(model, inputs[one.name][sizes[-1]][0])
        if one.student is not None:
            extra |= exports.onnx_rows(one, settings, inputs[one.name])
        extra |= exports.gpu_row(one, model, inputs[one.name])
    if settings.elmo_reference:
        extra[elmo.LABEL] = exports.elmo_row(settings, texts)
    runners |= {name: row.runner for name, row in extra.items()}
    inputs |= {name: row.inputs for name, row in extra.items()}
    sentences = len(texts) * len(runners) * (1 + len(latency.BATCH_SIZES))
    with console.progress(sentences, "sentences", "latency") as shown:
        times = latency.measure(runners, inputs, settings.latency_threads, shown.advance)
    rows = {
        name: {"parameters": row.parameters, "bytes": row.bytes, "latency": as_json(times[name])}
        for name, row in extra.items()
    }
    return {one.name: times[one.name] for one in candidates}, memory, rows


def as_json(measured: Latency) -> dict[str, Any]:
    """A latency as report.json holds it: batch sizes are texts."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(measured)))
    return values


def latency_texts(settings: Evaluation) -> tuple[list[tuple[str, ...]], str]:
    """The texts on which the models are timed, and their name in the report."""
    task, part = latency_part(settings)
    split = load(task, part, settings.data)
    texts: list[tuple[str, ...]] = [(one.question, one.context) for one in split.questions] or split.texts
    if task.kind == "tokens":
        texts = [(" ".join(words),) for words in texts]
    timed = texts[: settings.latency_sentences or None]
    label = f"{task.name} {part.partition('_')[0]}"
    return timed, label if len(timed) == len(texts) else f"first {len(timed):,} of {label}"


def latency_part(settings: Evaluation) -> tuple[Task, str]:
    """STS-B dev, if its file is there or it is one of the tasks; else the scored part of the first task."""
    tasks = find_tasks(settings.tasks)
    known = find_task("STS-B")
    wanted = settings.data is not None or known.name in [task.name for task in tasks]
    if wanted and has_part(known, "dev", settings.data):
        return known, "dev"
    return tasks[0], tasks[0].scored_parts[0]
