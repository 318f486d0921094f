"""Runs one job: fine-tunes a model and publishes its predictions and its score file (see ``jobs``)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from evaluation.candidates.models import copy_files, load_model, load_tokenizer, require_fit
from evaluation.finetuning import distillation
from evaluation.finetuning.jobs import ORIGIN, Job, load_test_splits, predicted_parts, scores_of
from evaluation.finetuning.training import Fit, Loss, Schedule, fit, predict
from evaluation.kinds import predictions
from evaluation.kinds.registry import kind_of
from evaluation.measures.model_outputs import Answers
from evaluation.tasks.encoded import Encoded
from evaluation.tasks.task import Split, Task
from infra.files import storage

PREDICT_SIZE = 64
"""Batch size of predictions."""
PREDICT_SIZES = {"spans": 32}
"""Kind of task -> batch size of predictions, for kinds with long rows."""


def run(
    job: Job, splits: dict[str, Split], advance: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """Fine-tunes the job's model; publishes predictions, then the score file, whose content it returns.

    ``advance`` is called with the number of rows after every step. Raises UserError if the loss or an output
    is not finite, or if the model does not fit the tokenizer or the row length.
    """
    started = time.perf_counter()
    task, settings = job.task, job.settings
    tokenizer = load_tokenizer(job.candidate.directory)
    model = load_model(job.candidate, task, job.seed).to(device())
    length, dtype = job.hyper_parameters.max_length, settings.dtype
    require_fit(job.candidate.directory, model.config, tokenizer, length)
    fitted = _train(job, model, tokenizer, splits["train"], advance) if kind_of(task).fine_tuned else None
    parts = {part: splits[part] for part in predicted_parts(task)}
    tests = load_test_splits(task, settings.data) if job.predict_test else {}
    parts |= tests
    predicted = {part: answers(model, tokenizer, task, parts[part], length, dtype) for part in parts}
    result = _result(job, splits, fitted, predicted) | {"seconds": round(time.perf_counter() - started, 3)}
    if job.predict_test:
        result["test_splits"] = {part: split.digest() for part, split in tests.items()}
    if job.keep_model:
        save(model, tokenizer, job.model_directory, job.origin(splits))
    storage.publish_json(job.path, result)
    return result


def _train(job: Job, model: Any, tokenizer: Any, train: Split, advance: Callable[[int], None]) -> Fit:
    """Fine-tunes ``model`` in place, on labels, or on labels and the job's soft labels."""
    task, settings, kind = job.task, job.settings, kind_of(job.task)
    if task.kind == "regression":
        start_at_mean(model, train.labels)
    data = kind.encode(tokenizer, task, train, job.hyper_parameters.max_length)
    loss: Loss = kind.loss
    if job.soft_labels is not None:
        data = distillation.add_outputs(data, task, train, job.soft_labels, settings.dtype)
        loss = distillation.distillation_loss(task, settings.distillation_temperature)
    return fit(model, data, loss, schedule(job), job.seed, tokenizer.pad_token_id, advance)


def schedule(job: Job) -> Schedule:
    chosen = job.hyper_parameters
    rate, dtype = chosen.learning_rate, job.settings.dtype
    return Schedule(chosen.epochs, chosen.batch_size, rate, dtype, max_steps=chosen.max_steps)


def _result(
    job: Job, splits: dict[str, Split], fitted: Fit | None, predicted: predictions.Predictions
) -> dict[str, Any]:
    """Publishes the predictions; returns the content of the score file."""
    labelled = {part: predicted[part] for part in predicted_parts(job.task)}
    result = {
        "key": job.key(splits),
        "candidate": job.candidate.name,
        "task": job.task_name,
        "setting": asdict(job.hyper_parameters),
        "seed": job.seed,
        **scores_of(job.task, labelled),
        "predictions": predictions.publish(job.predictions_path, job.task, predicted),
        "train": None,
        "notes": [note for split in splits.values() for note in split.notes],
    }
    if fitted is not None:
        speed = {"seconds": fitted.seconds, "rows_per_second": fitted.rows / fitted.seconds}
        rounded = {name: round(value, 3) for name, value in speed.items()}
        machine = {"threads": torch.get_num_threads(), "device": str(device())}
        result["train"] = asdict(fitted) | rounded | machine
    return result


def start_at_mean(model: torch.nn.Module, labels: np.ndarray) -> None:
    """Sets the bias of a regression head to the mean label.

    Otherwise a small model may learn little more than the mean in a few hundred steps.
    """
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for head in [module for module in linear if module.out_features == 1 and module.bias is not None][-1:]:
        torch.nn.init.constant_(head.bias, float(labels.mean()))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def answers(
    model: torch.nn.Module, tokenizer: Any, task: Task, split: Split, length: int, dtype: str
) -> Answers:
    """Returns the model's outputs on a split, with the split's labels, if any."""
    kind, pad_id = kind_of(task), tokenizer.pad_token_id
    size = PREDICT_SIZES.get(task.kind, PREDICT_SIZE)

    def outputs(data: Encoded) -> list[np.ndarray]:
        return predict(model, data, size, dtype, pad_id, kind.select_outputs)

    return kind.answers(outputs, tokenizer, task, split, length)


def save(model: Any, tokenizer: Any, directory: str, origin: dict[str, Any]) -> None:
    """Publishes a fine-tuned model, with ``origin`` in the file ORIGIN."""
    import tempfile

    with tempfile.TemporaryDirectory() as draft:
        model.save_pretrained(draft, safe_serialization=True)
        tokenizer.save_pretrained(draft)
        storage.publish_json(storage.join(draft, ORIGIN), origin)
        copy_files(draft, directory)
