"""One fine-tuning run: from a job to predictions and a score file, which marks the job as done (see
``jobs``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from evaluation.finetuning import distillation
from evaluation.finetuning.jobs import Job
from evaluation.finetuning.training import Encoded, Fit, Loss, Schedule, Targets, fit, predict
from evaluation.measures import predictions
from evaluation.measures.metrics import task_score
from evaluation.measures.predictions import Answers
from evaluation.models import load_model, load_tokenizer, require_fit
from evaluation.tasks import squad, submission
from evaluation.tasks.loading import has_part, load
from evaluation.tasks.task import Split, Task
from infra.control_tokens import tokenize
from infra.files import storage
from infra.settings.sections import Evaluation


def run(
    job: Job, splits: dict[str, Split], advance: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """Fine-tune, publish predictions, then the score file. ``advance`` gets the rows of every step."""
    task, settings = job.task, job.settings
    tokenizer = load_tokenizer(job.candidate.directory)
    model = load_model(job.candidate, task, job.seed).to(device())
    length = task.max_length or settings.max_length
    require_fit(job.candidate.directory, model.config, tokenizer, length)
    if task.kind == "regression" and splits["train"].labels is not None:
        start_at_mean(model, splits["train"].labels)
    training_set, loss = encode(tokenizer, task, splits["train"], length), loss_for(task)
    if job.lesson is not None:
        training_set = distillation.add_outputs(
            training_set, task, splits["train"], job.lesson.outputs, job.lesson.digest, settings.dtype
        )
        loss = distillation.distilled(task, loss, settings.distillation_temperature)
    fitted = fit(model, training_set, loss, schedule(settings), job.seed, tokenizer.pad_token_id, advance)
    found = {
        part: answers(model, tokenizer, task, splits[part], length, settings.dtype) for part in task.dev_parts
    }
    digest = predictions.publish(job.predictions_path, task, found)
    result = _result(job, splits, fitted, predictions.score(task, found), digest)
    if job.predict_test:
        result["test_files"] = _predict_test(job, model, tokenizer, length)
    if job.keep_model:
        save(model, tokenizer, job.model_directory)
    storage.publish_json(job.path, result)
    return result


def schedule(settings: Evaluation) -> Schedule:
    return Schedule(
        settings.epochs,
        settings.batch_size,
        settings.learning_rate,
        settings.dtype,
        max_steps=settings.max_steps,
    )


def _result(
    job: Job, splits: dict[str, Split], fitted: Fit, metrics: dict[str, float], digest: str
) -> dict[str, Any]:
    return {
        "key": job.key(splits),
        "candidate": job.candidate.name,
        "task": job.task_name,
        "seed": job.seed,
        "metrics": metrics,
        "score": task_score(metrics),
        "predictions": digest,
        "train": {
            "rows": fitted.rows,
            "steps": fitted.steps,
            "seconds": round(fitted.seconds, 3),
            "rows_per_second": round(fitted.rows / fitted.seconds, 3),
            "loss": fitted.loss,
            "threads": torch.get_num_threads(),
            "device": str(device()),
        },
        "notes": [note for split in splits.values() for note in split.notes],
    }


def start_at_mean(model: torch.nn.Module, labels: np.ndarray) -> None:
    """Sets a regression head's bias to the mean label, so that no training steps are spent on learning it.

    In a few hundred steps a small model may otherwise learn little but the mean.
    """
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for head in [module for module in linear if module.out_features == 1 and module.bias is not None][-1:]:
        torch.nn.init.constant_(head.bias, float(labels.mean()))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encode(tokenizer: Any, task: Task, split: Split, length: int) -> Encoded:
    """Token ids of texts or of SQuAD windows, with the labels as targets where the split has any."""
    if task.kind == "spans":
        return squad.encode(tokenizer, split.questions, length).encoded
    columns = [list(column) for column in zip(*split.texts, strict=True)]
    output = tokenize(tokenizer, *columns, truncation=True, max_length=length)
    targets = {} if split.labels is None else {"label": split.labels}
    return Encoded(output["input_ids"], output["token_type_ids"], targets)


def loss_for(task: Task) -> Loss:
    """Cross-entropy, squared error, or the mean of the cross-entropies of start and end."""
    return {"classification": _class_loss, "regression": _regression_loss, "spans": _span_loss}[task.kind]


def _class_loss(output: Any, targets: Targets) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.logits.float(), targets["label"])


def _regression_loss(output: Any, targets: Targets) -> torch.Tensor:
    return torch.nn.functional.mse_loss(output.logits.float().squeeze(-1), targets["label"])


def _span_loss(output: Any, targets: Targets) -> torch.Tensor:
    start = torch.nn.functional.cross_entropy(output.start_logits.float(), targets["start"])
    return (start + torch.nn.functional.cross_entropy(output.end_logits.float(), targets["end"])) / 2


def span_logits(output: Any) -> torch.Tensor:
    """[B, 2, L]."""
    return torch.stack([output.start_logits, output.end_logits], dim=1)


def answers(
    model: torch.nn.Module, tokenizer: Any, task: Task, split: Split, length: int, dtype: str
) -> Answers:
    """The model's outputs on a split, with its labels where it has any."""
    if task.kind == "spans":
        windows = squad.encode(tokenizer, split.questions, length)
        logits = predict(model, windows.encoded, 32, dtype, tokenizer.pad_token_id, span_logits)
        texts = squad.best_answers(windows, logits, split.questions)
        return Answers([question.answers for question in split.questions], texts, split.ids)
    data = encode(tokenizer, task, split, length)
    outputs = np.stack(predict(model, data, 64, dtype, tokenizer.pad_token_id))
    return Answers(split.labels, outputs[:, 0] if task.kind == "regression" else outputs, split.ids)


def score(
    model: torch.nn.Module, tokenizer: Any, task: Task, split: Split, length: int, dtype: str
) -> dict[str, float]:
    """The task's metrics on a labelled split."""
    return predictions.score_split(task, answers(model, tokenizer, task, split, length, dtype))


def _predict_test(job: Job, model: torch.nn.Module, tokenizer: Any, length: int) -> list[str]:
    """Publishes a prediction file for every test part whose official file is there; their names."""
    names = []
    for part in job.task.test_parts:
        if not has_part(job.task, part, job.settings.data):
            continue
        split = load(job.task, part, job.settings.data)
        found = answers(model, tokenizer, job.task, split, length, job.settings.dtype)
        name = f"seed-{job.seed}.{job.task.parts[part].submission}.tsv"
        text = submission.prediction_file(job.task, split.index, predictions.decide(job.task, found))
        storage.publish_bytes(storage.join(job.directory, name), text.encode())
        names.append(name)
    return names


def save(model: Any, tokenizer: Any, directory: str) -> None:
    """Saves the model under a temporary name and publishes config.json last, which marks a complete model."""
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as draft:
        model.save_pretrained(draft, safe_serialization=True)
        tokenizer.save_pretrained(draft)
        names = sorted(os.listdir(draft), key=lambda name: (name == "config.json", name))
        for name in names:
            with open(os.path.join(draft, name), "rb") as file:
                storage.publish_bytes(storage.join(directory, name), file.read())
