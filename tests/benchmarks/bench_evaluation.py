"""Fine-tuning rate against ``transformers.Trainer`` with its defaults: same model, rows, epochs, threads.

    python tests/benchmarks/bench_evaluation.py --model DIR --data DIR [--rows 2000] [--seeds 3]

Prints ``evaluation.finetune_over_trainer``: examples/s of the one over the other, and the median scores.
The rates of a pair are taken back to back, seed by seed, so that a noisy machine falls on both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from typing import Any

import numpy as np
import torch

from evaluation.finetune import device, encode, loss_for, score, score_logits
from evaluation.metrics import task_score
from evaluation.models import Candidate, load_model, load_tokenizer
from evaluation.tasks import Split, Task, find_task, load
from evaluation.training import Schedule, fit


def ours(
    candidate: Candidate, task: Task, train: Split, dev: Split, seed: int, schedule: Schedule
) -> tuple[float, float]:
    """(examples/s of training, score)."""
    tokenizer, model = load_tokenizer(candidate.directory), load_model(candidate, task, seed).to(device())
    data = encode(tokenizer, task, train, 128)
    fitted = fit(model, data, loss_for(task), schedule, seed, tokenizer.pad_token_id)
    values = score(model, tokenizer, task, dev, 128, schedule.dtype)
    return fitted.rows / fitted.seconds, task_score(values)


def trainer(
    candidate: Candidate, task: Task, train: Split, dev: Split, seed: int, epochs: float
) -> tuple[float, float]:
    """The same with ``TrainingArguments`` as they are but for epochs, seed and reporting."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer, model = load_tokenizer(candidate.directory), load_model(candidate, task, seed)
    rows = {name: _rows(tokenizer, split) for name, split in (("train", train), ("dev", dev))}
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output, num_train_epochs=epochs, seed=seed, report_to="none", save_strategy="no",
            disable_tqdm=True, use_cpu=device().type == "cpu",
        )  # fmt: skip
        run = Trainer(
            model, arguments, train_dataset=rows["train"], data_collator=DataCollatorWithPadding(tokenizer)
        )
        started = time.perf_counter()
        run.train()
        seconds = time.perf_counter() - started
        logits = run.predict(rows["dev"]).predictions
    return len(train) * epochs / seconds, task_score(score_logits(task, np.asarray(logits), dev))


def _rows(tokenizer: Any, split: Split) -> list[dict[str, Any]]:
    assert split.labels is not None
    columns = [list(column) for column in zip(*split.texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=128)
    labels = split.labels.tolist()
    return [
        {name: encoded[name][row] for name in encoded} | {"label": labels[row]} for row in range(len(split))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="SST-2")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    task, candidate = find_task(options.task), Candidate("model", options.model)
    train, dev = load(task, "train", options.data), load(task, "dev", options.data)
    assert train.labels is not None
    train = dataclasses.replace(train, texts=train.texts[: options.rows], labels=train.labels[: options.rows])
    results: dict[str, list[tuple[float, float]]] = {}
    for seed in range(options.seeds):
        for dtype in options.dtypes.split(","):
            schedule = Schedule(options.epochs, options.batch_size, options.learning_rate, dtype)
            results.setdefault(dtype, []).append(ours(candidate, task, train, dev, seed, schedule))
        results.setdefault("trainer", []).append(trainer(candidate, task, train, dev, seed, options.epochs))
    rates = {name: float(np.median([rate for rate, _ in pairs])) for name, pairs in results.items()}
    scores = {name: float(np.median([value for _, value in pairs])) for name, pairs in results.items()}
    print(json.dumps({
        "task": task.name, "rows": len(train), "epochs": options.epochs, "seeds": options.seeds,
        "threads": torch.get_num_threads(), "device": str(device()),
        "examples_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "median_score": {name: round(value, 4) for name, value in scores.items()},
        "evaluation.finetune_over_trainer": {
            name: round(rate / rates["trainer"], 2) for name, rate in rates.items() if name != "trainer"
        },
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
