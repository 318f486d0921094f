"""Writes the same teacher outputs as a store and in other programs' formats, and compares the files.

``python tests/benchmarks/bench_storage_formats.py [--json docs/storage.json]`` prints the rows; ``run()``
returns them. ``python -m docs.storage_table`` makes the tables of docs/storage.md from the JSON file.

Measured are bytes per token, the rates of writing, of reading in the order of the samples and of reading in
the shuffled order of training, and what happens after single bits of the files are flipped.

Rates count the processor time of the process, all its threads together: a wait for the disk or for another
program does not count. In every round each format is written and read once, and the median counts.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.files import storage
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.schema import Columns, Layout, Plan
from student_train.data.order import SampleOrder
from tests.benchmarks.bench_store import SHAPE, TARGETS
from tests.benchmarks.bit_flips import count_outcomes
from tests.benchmarks.random_outputs import make_outputs
from tests.benchmarks.results import Row, row, rows_table
from tests.benchmarks.storage_formats import Format, JsonFormat, RecordFormat, StoreFormat, TarFormat

BASE = Layout(**SHAPE, **TARGETS, hidden_states="float16", positions="all")
"""BERT-base's dimensions, with everything that the formats are compared on."""
BATCH = 32
"""Number of samples that are read at once."""
RATES = {"write": "writing", "read": "reading in order", "shuffled": "reading in the order of training"}
"""Key of a rate in tokens/s -> its name in words."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    hidden_samples: int = 512
    topk_samples: int = 1024
    json_samples: int = 16
    """Fewer, because this format is slow; so few that opening the file hardly counts against it."""
    vocabulary_samples: int = 2
    rounds: int = 5
    flip_samples: int = 3
    flips: int = 200


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        return list(rows(measure(Path(directory), Size())))


def measure(directory: Path, size: Size, base: Layout = BASE) -> Result:
    """Measures everything in ``directory``, which must be empty. Returns what `docs.storage_table` reads:
    ``conditions``, ``formats`` (one entry per format and content), ``vocabulary`` and ``flips``."""
    load = os.getloadavg()[0]
    hidden = replace(base, top_k=0, temperatures=())
    topk = replace(base, hidden_states="none")
    rates = list(_compared(directory, "hidden states", hidden, size.hidden_samples, size))
    rates += _compared(directory, f"top-{base.top_k}", topk, size.topk_samples, size)
    return {
        "conditions": _conditions(load, size, base),
        "formats": rates,
        "vocabulary": _vocabulary(directory, size.vocabulary_samples, base),
        "flips": list(_flips(directory, size, base)),
    }


def _conditions(load: float, size: Size, base: Layout) -> Result:
    processor = f"{os.cpu_count()} cores of {torch.backends.cpu.get_cpu_capability()}"
    busy = "other programs used the machine" if load > 0.5 else "no other program used the machine"
    return {
        "machine": f"{processor}; {busy} (load average {load:.1f} when the measurement began)",
        "clock": "processor time of one process, page cache warm",
        "rounds": size.rounds,
        "length": base.length,
        "hidden_size": base.hidden_size,
        "vocab_size": base.vocab_size,
        "top_k": base.top_k,
        "temperatures": list(base.temperatures),
        "flips": size.flips,
    }


def _formats(layout: Layout) -> list[Format]:
    """Returns the formats that can hold this layout's outputs."""
    small = [StoreFormat(replace(layout, hidden_states="int8"))] if layout.hidden_states == "float16" else []
    tars = [TarFormat(layout), TarFormat(layout, BATCH)]
    return [StoreFormat(layout), *small, *tars, RecordFormat(layout), JsonFormat(layout)]


def _compared(directory: Path, holds: str, layout: Layout, samples: int, size: Size) -> Iterator[Result]:
    """Yields one entry per format: bytes per token, and the rates as tokens/s. ``holds``: the outputs of
    this layout, in words."""
    outputs = make_outputs(layout, samples)
    order = training_order(layout, samples)
    formats = _formats(layout)
    counts = [size.json_samples if isinstance(one, JsonFormat) else samples for one in formats]
    kept = [
        one.kept({name: values[:count] for name, values in outputs.items()})
        for one, count in zip(formats, counts, strict=True)
    ]
    del outputs
    rates: list[dict[str, list[float]]] = [{key: [] for key in RATES} for _ in formats]
    for _ in range(size.rounds + 1):
        for place, one in enumerate(formats):
            own = directory / f"{holds} {place}"
            shutil.rmtree(own, ignore_errors=True)
            for key, rate in _round(one, own, kept[place], order[order < counts[place]]).items():
                rates[place][key].append(rate)
    for place, one in enumerate(formats):
        medians = {key: statistics.median(values[1:]) for key, values in rates[place].items()}  # 0: warm-up
        bytes_per_sample = _bytes(one.files(directory / f"{holds} {place}")) / counts[place]
        yield {
            "format": one.name,
            "holds": holds,
            "samples": counts[place],
            "bytes_per_token": bytes_per_sample / layout.length,
            "write_bytes_per_s": bytes_per_sample * medians["write"],
            **{f"{key}_tokens_per_s": layout.length * value for key, value in medians.items()},
        }


def _round(one: Format, directory: Path, columns: Columns, order: np.ndarray) -> dict[str, float]:
    """Writes and reads once. Returns samples/s of every key of ``RATES``. Members of several samples are so
    slow in shuffled order that only the first samples of the order are read."""
    directory.mkdir()
    shuffled = order[: 2 * BATCH] if isinstance(one, TarFormat) and one.member_samples > 1 else order

    def read(numbers: np.ndarray) -> None:
        with one.opened(directory) as reader:
            for at in range(0, len(numbers), BATCH):
                reader(numbers[at : at + BATCH])

    return {
        "write": len(order) / _seconds(lambda: one.write(directory, columns)),
        "read": len(order) / _seconds(lambda: read(np.sort(order))),
        "shuffled": len(shuffled) / _seconds(lambda: read(shuffled)),
    }


def _seconds(function: Callable[[], None]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def training_order(layout: Layout, samples: int) -> np.ndarray:
    """Returns the numbers of the samples of one part in the order of one training epoch, int64 [samples]."""
    plan = SplitPlan.of("train", (samples,), Plan.from_bytes(layout, 1, samples))
    order = SampleOrder(plan, seed=0, batch_size=BATCH, samples=samples, window_batches=64)
    batches = [order.batch(step) for step in range(order.steps)]
    return np.concatenate([batch.block * plan.block_samples + batch.row for batch in batches])


def _bytes(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _vocabulary(directory: Path, samples: int, base: Layout) -> Result:
    """Returns the bytes per token of all logits of the vocabulary, as compressed float16 tensors in a tar."""
    layout = replace(base, top_k=0, temperatures=(), hidden_size=base.vocab_size)
    tar, own = TarFormat(layout), directory / "vocabulary"
    own.mkdir()
    outputs = make_outputs(layout, samples)
    outputs["hidden_states"] *= 3 / outputs["hidden_states"].std()  # these columns stand for the logits
    tar.write(own, tar.kept(outputs))
    tokens = samples * layout.length
    return {"format": tar.name, "samples": samples, "bytes_per_token": _bytes(tar.files(own)) / tokens}


def _flips(directory: Path, size: Size, base: Layout) -> Iterator[Result]:
    """Yields one entry per format: the number of flips with each outcome. The files hold top-k and hidden
    states of a few samples, and every flip is followed by a read of all of them."""
    outputs, numbers = make_outputs(base, size.flip_samples), np.arange(size.flip_samples)
    tars = [TarFormat(base), TarFormat(base, checksum=True)]
    formats: list[Format] = [StoreFormat(base), *tars, RecordFormat(base), JsonFormat(base)]
    for one in formats:
        own = directory / f"flips {one.name}"
        own.mkdir()
        one.write(own, one.kept(outputs))

        def read(one: Format = one, own: Path = own) -> Columns:
            with one.opened(own) as reader:
                return reader(numbers)

        counts = count_outcomes(one.payload(own), read, size.flips)
        yield {"format": one.name, "flips": size.flips, **counts}


def rows(result: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the rows of a result of ``measure``; none has a goal."""
    known = result["conditions"]
    where = f"L={known['length']}, D={known['hidden_size']}, {known['machine']}, {known['clock']}"
    for one in result["formats"]:
        name = _row_name(one["holds"], one["format"])
        words = f"{one['samples']} samples, {where}"
        yield row(f"{name}.bytes_per_token", one["bytes_per_token"], "bytes", None, words)
        yield row(f"{name}.write_megabytes", one["write_bytes_per_s"] / 1e6, "MB/s", None, words)
        for key, what in RATES.items():
            yield row(f"{name}.{key}", one[f"{key}_tokens_per_s"], "tokens/s", None, f"{what}; {words}")
    for one in result["flips"]:
        name = _row_name("flips", one["format"])
        yield row(
            f"{name}.silent", one["silent"], "flips", None, f"of {one['flips']} single bits, one at a time"
        )


def _row_name(*parts: str) -> str:
    return ".".join(["storage_formats", *(re.sub(r"\W+", "_", part) for part in parts)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--directory", help="where the files are written and deleted; default: temporary")
    parser.add_argument("--json", help="file for the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        result = measure(Path(directory), Size())
    if options.json:
        storage.publish_json(options.json, result)
    print(rows_table(list(rows(result))))


if __name__ == "__main__":
    main()
