"""Measures seconds per sentence as DistilBERT's table 3 does: a pass over STS-B dev at batch size 1.

Only the model's forward pass is timed, on inputs tokenized beforehand. The models take turns in rotating
order, one block of sentences per turn, so that other load on the machine affects all of them equally.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evaluation.finetuning.model_inputs import inputs_of
from infra.control_tokens import tokenize

Inputs = dict[str, np.ndarray]
"""input_ids, attention_mask, token_type_ids: int64 [B, L]."""
Runner = Callable[[Inputs], object]
"""Function that runs one forward pass, and ignores inputs that its model does not take."""

BLOCK = 10
"""Number of sentences per turn. The first ones fill the processor's caches after another model's turn."""
WARMUP = 5
"""Number of batches that each model runs before it is timed."""
BATCH_SIZES = (8, 32)
"""Batch sizes at which throughput is measured."""


@dataclass(frozen=True)
class Latency:
    total_seconds: float
    """Seconds for all sentences at batch size 1; p50, p95 and p99 are percentiles of a sentence's time."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    throughput: dict[int, float]
    """Batch size -> sentences per second."""


def torch_runner(model: torch.nn.Module, device: str = "cpu") -> Runner:
    """Returns a function that runs a torch model's forward pass; on a GPU it waits for the result."""
    model, select_inputs = model.eval().to(device), inputs_of(model)

    def run(inputs: Inputs) -> object:
        tensors = {name: torch.from_numpy(array).to(device) for name, array in select_inputs(inputs).items()}
        return model(**tensors).logits.cpu()

    return run


def batches(tokenizer: Any, texts: Sequence[tuple[str, ...]], batch_size: int, length: int) -> list[Inputs]:
    """Returns the tokenized texts in the given order; each batch is padded to its longest row.

    ``length``: the largest number of tokens of a row.
    """
    made = []
    for start in range(0, len(texts), batch_size):
        columns = [list(column) for column in zip(*texts[start : start + batch_size], strict=True)]
        output = tokenize(tokenizer, *columns, truncation=True, max_length=length, padding=True)
        made.append({name: np.asarray(array, np.int64) for name, array in output.items()})
    return made


def measure(
    runners: Mapping[str, Runner],
    inputs: Mapping[str, Mapping[int, list[Inputs]]],
    threads: int,
    advance: Callable[[int], None] = lambda sentences: None,
) -> dict[str, Latency]:
    """Returns name -> latency of its runner. ``inputs``: name -> batch size (1 and others) -> batches.

    ``advance`` is called with the number of sentences after every turn of a model.
    """
    with _torch_threads(threads), torch.inference_mode():
        single = interleave(runners, {name: sizes[1] for name, sizes in inputs.items()}, BLOCK, advance)
        sizes = sorted({size for by_size in inputs.values() for size in by_size if size > 1})
        larger = {
            size: interleave(runners, {name: by_size[size] for name, by_size in inputs.items()}, 1, advance)
            for size in sizes
        }
    latencies = {}
    for name, seconds in single.items():
        p50, p95, p99 = (1000 * float(value) for value in np.percentile(seconds, (50, 95, 99)))
        rates = {size: _sentences(inputs[name][size]) / float(larger[size][name].sum()) for size in sizes}
        latencies[name] = Latency(float(seconds.sum()), p50, p95, p99, rates)
    return latencies


def interleave(
    runners: Mapping[str, Runner],
    inputs: Mapping[str, list[Inputs]],
    block: int,
    advance: Callable[[int], None] = lambda sentences: None,
) -> dict[str, np.ndarray]:
    """Returns name -> seconds of each batch, float64 [batches].

    The runners take turns, ``block`` batches per turn; which runner comes first rotates from block to block.
    """
    names = list(runners)
    counts = {len(batches) for batches in inputs.values()}
    assert len(counts) == 1, "every model is timed on the same sentences"
    count = counts.pop()
    seconds = {name: np.zeros(count) for name in names}
    for name in names:
        for batch in inputs[name][:WARMUP]:
            runners[name](batch)
    for turn, start in enumerate(range(0, count, block)):
        numbers = range(start, min(start + block, count))
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for number in numbers:
                started = time.perf_counter()
                runners[name](inputs[name][number])
                seconds[name][number] = time.perf_counter() - started
            advance(_sentences([inputs[name][number] for number in numbers]))
    return seconds


def _sentences(batches: Sequence[Inputs]) -> int:
    return sum(len(batch["input_ids"]) for batch in batches)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
