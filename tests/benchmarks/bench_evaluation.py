"""Fine-tuning rate of the evaluation relative to ``transformers.Trainer``.

    python tests/benchmarks/bench_evaluation.py --model DIR --data DIR [--rows 2000] [--seeds 3]

Both have the same model, rows, epochs, batch size, learning rate, dtype and threads; the Trainer's other
settings are its defaults. Prints ``evaluation.finetune_over_trainer``, the ratio of examples/s, and the
median scores; the goal also requires that our score is not lower. ``run()`` uses ../shared's teacher and
SST-2 if they exist. Both rates of a pair are measured one after the other, so that a busy machine affects
both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evaluation.candidates.models import Candidate, load_model, load_tokenizer
from evaluation.finetuning.finetune import device, score
from evaluation.finetuning.training import Schedule, fit
from evaluation.kinds.predictions import Answers, score_split, task_score
from evaluation.kinds.registry import kind_of
from evaluation.sources.catalogue import find_task
from evaluation.sources.loading import load
from evaluation.tasks.task import Split, Task
from tests.benchmarks.results import Row, row

SHARED = Path(__file__).resolve().parents[3] / "shared"


def ours(
    candidate: Candidate, task: Task, train: Split, dev: Split, seed: int, schedule: Schedule
) -> tuple[float, float]:
    """Returns examples/s of training, and the score, of the evaluation's fine-tuning."""
    tokenizer, model = load_tokenizer(candidate.directory), load_model(candidate, task, seed).to(device())
    data = kind_of(task).encode(tokenizer, task, train, 128)
    fitted = fit(model, data, kind_of(task).loss, schedule, seed, tokenizer.pad_token_id)
    values = score(model, tokenizer, task, dev, 128, schedule.dtype)
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
            learning_rate=schedule.learning_rate, bf16=schedule.dtype == "bfloat16", seed=seed,
            report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=device().type == "cpu",
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


def measure(
    model: str, data: str, task_name: str = "SST-2", rows: int = 2_000, seeds: int = 3, epochs: float = 1.0,
    batch_size: int = 16, learning_rate: float = 2e-4,
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16",),
) -> list[Row]:  # fmt: skip
    """Returns one row per dtype: the ratio of the median rates, with both median scores in its conditions."""
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
        last = {name: round(pairs[-1][0], 1) for name, pairs in results.items()}
        print(f"finetune: seed {seed}: examples/s {last}", file=sys.stderr, flush=True)
    rates = {name: float(np.median([rate for rate, _ in pairs])) for name, pairs in results.items()}
    scores = {name: float(np.median([value for _, value in pairs])) for name, pairs in results.items()}
    where = (
        f"{task.name}, {len(train):,} rows, {epochs:g} epochs, medians of {seeds} seeds, "
        f"{torch.get_num_threads()} threads on {device()}, examples/s: "
        + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    )
    measured = []
    for dtype in dtypes:
        other = f"trainer {dtype}"
        ratio, not_worse = rates[dtype] / rates[other], scores[dtype] >= scores[other]
        conditions = f"{where}; score {scores[dtype]:.4f} against {scores[other]:.4f}"
        rate_row = row(f"evaluation.finetune_over_trainer_{dtype}", ratio, "ratio", ">= 1.5", conditions)
        measured.append({**rate_row, "holds": bool(rate_row["holds"]) and not_worse})
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtypes", default=("bfloat16", "float32"), type=lambda text: tuple(text.split(",")))
    for measured in measure(**vars(parser.parse_args())):
        print(json.dumps(measured))


if __name__ == "__main__":
    main()
