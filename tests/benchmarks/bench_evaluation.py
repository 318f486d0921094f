"""Fine-tuning rate of the evaluation relative to ``transformers.Trainer``.

    python tests/benchmarks/bench_evaluation.py --model DIR --data DIR [--rows 2000] [--seeds 8]

Both have the same model, rows, epochs, batch size, learning rate with its warm-up, dtype and threads; the
Trainer's other settings are its defaults. The dtype is the processor's own: bfloat16 if it computes in it,
otherwise float32. Prints ``evaluation.finetune_over_trainer``, the ratio of the median examples/s, and the
mean scores. The goal also requires that our score is not lower (``is_not_lower``). ``run()`` uses ../shared's
teacher and SST-2 if they exist. Both rates of a pair are measured one after the other, so that a busy machine
affects both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evaluation.candidates.models import Candidate, load_model, load_tokenizer
from evaluation.finetuning.finetune import answers, device
from evaluation.finetuning.jobs import WARM_UP
from evaluation.finetuning.training import Schedule, fit
from evaluation.kinds.predictions import Answers, score_split, task_score
from evaluation.kinds.registry import kind_of
from evaluation.sources.catalogue import find_task
from evaluation.sources.loading import load
from evaluation.tasks.task import Split, Task
from infra.cpu.processor import computes_bfloat16
from tests.benchmarks.results import Row, row

SHARED = Path(__file__).resolve().parents[3] / "shared"
DTYPE: Literal["bfloat16", "float32"] = (
    "bfloat16" if torch.cuda.is_available() or computes_bfloat16() else "float32"
)
LARGEST_ERROR = 0.01
"""Standard error of the difference of mean scores above which the seeds are too few for a verdict."""


def ours(
    candidate: Candidate, task: Task, train: Split, dev: Split, seed: int, schedule: Schedule
) -> tuple[float, float]:
    """Returns examples/s of training, and the score, of the evaluation's fine-tuning."""
    tokenizer, model = load_tokenizer(candidate.directory), load_model(candidate, task, seed).to(device())
    data = kind_of(task).encode(tokenizer, task, train, 128)
    fitted = fit(model, data, kind_of(task).loss, schedule, seed, tokenizer.pad_token_id)
    values = score_split(task, answers(model, tokenizer, task, dev, 128, schedule.dtype))
    return fitted.rows / fitted.seconds, task_score(task, values)


def trainer(
    candidate: Candidate, task: Task, train: Split, dev: Split, seed: int, schedule: Schedule
) -> tuple[float, float]:
    """Returns examples/s of training, and the score, of ``transformers.Trainer``. Its arguments are the
    defaults, except for schedule, seed, device and saving."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer, model = load_tokenizer(candidate.directory), load_model(candidate, task, seed)
    rows = {name: _rows(tokenizer, split) for name, split in (("train", train), ("dev", dev))}
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output, num_train_epochs=schedule.epochs, per_device_train_batch_size=schedule.batch_size,
            learning_rate=schedule.learning_rate, warmup_steps=WARM_UP, bf16=schedule.dtype == "bfloat16",
            seed=seed, report_to="none", save_strategy="no", disable_tqdm=True,
            use_cpu=device().type == "cpu",
        )  # fmt: skip
        run = Trainer(
            model, arguments, train_dataset=rows["train"], data_collator=DataCollatorWithPadding(tokenizer)
        )
        started = time.perf_counter()
        run.train()
        seconds = time.perf_counter() - started
        logits = run.predict(rows["dev"]).predictions
    values = score_split(task, Answers(dev.labels, np.asarray(logits)))
    return len(train) * schedule.epochs / seconds, task_score(task, values)


def _rows(tokenizer: Any, split: Split) -> Any:
    """Returns the encoded rows as a list, which a Trainer accepts as a dataset."""
    assert split.labels is not None
    columns = [list(column) for column in zip(*split.texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=128)
    labels = split.labels.tolist()
    return [
        {name: encoded[name][row] for name in encoded} | {"label": labels[row]} for row in range(len(split))
    ]


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of first - second over seeds, and its standard error."""
    differences = [one - other for one, other in zip(first, second, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def is_not_lower(first: Sequence[float], second: Sequence[float]) -> bool:
    """Returns whether the mean of ``first`` is not significantly lower than that of ``second``.

    One-sided t-test at 5 % over seeds, pair by pair. A score varies by more than a point between seeds, so a
    standard error above ``LARGEST_ERROR`` shows nothing, and is not accepted either.
    """
    from scipy.stats import t

    mean, error = difference(first, second)
    return error <= LARGEST_ERROR and mean >= -float(t.ppf(0.95, len(first) - 1)) * error


def measure(
    model: str, data: str, task_name: str = "SST-2", rows: int = 2_000, seeds: int = 8, epochs: float = 1.0,
    batch_size: int = 16, learning_rate: float = 2e-4,
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = (DTYPE,),
) -> list[Row]:  # fmt: skip
    """Returns one row per dtype: the ratio of the median rates, with both mean scores in its conditions."""
    task, candidate = find_task(task_name), Candidate("model", model)
    train, dev = load(task, "train", data), load(task, "dev", data)
    assert train.labels is not None
    train = dataclasses.replace(train, texts=train.texts[:rows], labels=train.labels[:rows])
    results: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        for dtype in dtypes:
            schedule = Schedule(epochs, batch_size, learning_rate, dtype)
            for name, side in ((dtype, ours), (f"trainer {dtype}", trainer)):
                results.setdefault(name, []).append(side(candidate, task, train, dev, seed, schedule))
        last = {name: f"{pairs[-1][0]:.1f} examples/s, {pairs[-1][1]:.4f}" for name, pairs in results.items()}
        print(f"finetune: seed {seed}: {last}", file=sys.stderr, flush=True)
    rates = {name: float(np.median([rate for rate, _ in pairs])) for name, pairs in results.items()}
    scores = {name: [value for _, value in pairs] for name, pairs in results.items()}
    where = (
        f"{task.name}, {len(train):,} rows, {epochs:g} epochs, {seeds} seeds, "
        f"{torch.get_num_threads()} threads on {device()}, examples/s: "
        + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    )
    measured = []
    for dtype in dtypes:
        other = f"trainer {dtype}"
        gain, error = difference(scores[dtype], scores[other])
        means = [statistics.mean(scores[name]) for name in (dtype, other)]
        conditions = (
            f"{where}; mean score {means[0]:.4f} against {means[1]:.4f}, "
            f"difference {gain:+.4f} with a standard error of {error:.4f}"
        )
        ratio = rates[dtype] / rates[other]
        rate_row = row(f"evaluation.finetune_over_trainer_{dtype}", ratio, "ratio", ">= 1.5", conditions)
        not_lower = is_not_lower(scores[dtype], scores[other])
        measured.append({**rate_row, "holds": bool(rate_row["holds"]) and not_lower})
    return measured


def run() -> list[Row]:
    if not SHARED.is_dir():
        print("bench_evaluation: needs a model and a task's files, see its --help", flush=True)
        return []
    return measure(str(SHARED / "teacher"), str(SHARED / "data" / "glue"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="SST-2", dest="task_name")
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtypes", default=(DTYPE,), type=lambda text: tuple(text.split(",")))
    for measured in measure(**vars(parser.parse_args())):
        print(json.dumps(measured))


if __name__ == "__main__":
    main()
