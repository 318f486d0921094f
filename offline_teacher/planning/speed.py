"""Measures the tokens per second of one worker with the code that workers run."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import numpy as np
import torch

from infra.settings.recipe import Recipe
from infra.settings.sections import Teacher
from offline_teacher.inference.columns import Inference
from offline_teacher.inference.teacher import load_teacher
from offline_teacher.planning.teacher_sample import MaskedSequences
from offline_teacher.store.schema import Layout

LEAST_BATCHES, MOST_BATCHES = 3, 8
SECONDS = 12.0
"""After this many seconds no further batch is timed, once ``LEAST_BATCHES`` are done."""
WORKERS = (1, 8, 64)
"""Numbers of workers for which the report has hours, beside the recipe's own number."""


def measure_speed(recipe: Recipe, layout: Layout, sequences: MaskedSequences, tokens: int) -> dict[str, Any]:
    """Returns ``time`` of the report; without a GPU, the CPU's. ``tokens``: those of all masking epochs."""
    teacher = recipe.teacher
    assert teacher is not None
    device = "cuda" if teacher.gpus_per_worker and torch.cuda.is_available() else "cpu"
    loaded = load_teacher(teacher, layout.replay_layers, layout.top_k > 0, device)
    rates = _rates(teacher, Inference(loaded, layout), sequences)
    rate = statistics.median(rates)
    return {
        "tokens_per_s": rate,
        "batches": len(rates),
        "batch_size": teacher.batch_size,
        "dtype": teacher.dtype,
        "device": device,
        "gpus_per_worker": teacher.gpus_per_worker,
        "cpu_threads": teacher.cpu_threads,
        "cpus": os.cpu_count(),
        "workers": teacher.workers,
        "hours": {str(n): tokens / rate / n / 3600 for n in sorted({*WORKERS, teacher.workers})},
    }


def _rates(teacher: Teacher, inference: Inference, sequences: MaskedSequences) -> list[float]:
    """Returns tokens/s of each timed batch, with as many threads as a worker has. One more batch warms up."""
    size = teacher.batch_size
    # Sequences of one batch have similar lengths, as in a task.
    order = np.argsort(-sequences.token_count.astype(np.int64), kind="stable")
    starts = np.linspace(0, max(0, len(order) - size), MOST_BATCHES).astype(int)
    threads = torch.get_num_threads()
    torch.set_num_threads(teacher.cpu_threads)
    try:
        rates: list[float] = []
        begin = time.perf_counter()
        for start in (starts[0], *starts):
            batch = sequences.rows(np.resize(order[start : start + size], size))
            positions = batch.positions if inference.layout.masked else None
            before = time.perf_counter()
            inference.batch(batch.input_ids, batch.token_count, positions)
            rates.append(float(batch.token_count.sum()) / (time.perf_counter() - before))
            if len(rates) > LEAST_BATCHES and time.perf_counter() - begin > SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    return rates[1:]
