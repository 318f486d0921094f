"""A fine-tuned teacher run once over a task's training set, its outputs stored for the student."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from evaluation.finetuning import distillation, finetune, training
from evaluation.finetuning.jobs import Job
from evaluation.finetuning.outputs_store import Predict, store_outputs
from evaluation.finetuning.training import Encoded
from evaluation.models import Candidate, load_model, load_tokenizer
from evaluation.tasks.task import Split
from infra import console

BATCH_SIZE = 64


def store_lesson(job: Job, train: Split) -> None:
    """Store what ``job`` learns from beside the labels; what is stored already is not run again."""
    lesson, task = job.lesson, job.task
    assert lesson is not None
    tokenizer = load_tokenizer(lesson.model)
    data = finetune.encode(tokenizer, task, train, task.max_length or job.settings.max_length)
    spec = distillation.outputs_spec(task, train, data, lesson.digest, job.settings.dtype)

    def load() -> Predict:
        model = load_model(Candidate("teacher", lesson.model), task, seed=0).to(finetune.device())
        return lambda rows: outputs(model, data, rows, spec.shape, job.settings.dtype, tokenizer.pad_token_id)

    with console.progress(len(data), "rows", f"teacher's outputs for {task.name}") as shown:
        store_outputs(lesson.outputs, spec, load, shown.advance)


def outputs(
    model: torch.nn.Module, data: Encoded, rows: range, shape: tuple[int, ...], dtype: str, pad_id: int
) -> np.ndarray:
    """Logits of some rows, float32 [n, *shape]; a window's logits are 0 after its last token."""
    part = Encoded(data.input_ids[rows.start : rows.stop], data.token_type_ids[rows.start : rows.stop])
    read: Callable = finetune.span_logits if len(shape) == 2 else lambda output: output.logits
    found = np.zeros((len(part), *shape), np.float32)
    predicted = training.predict(model, part, BATCH_SIZE, dtype, pad_id, read)
    for row, (ids, logits) in enumerate(zip(part.input_ids, predicted, strict=True)):
        if len(shape) == 2:
            found[row, :, : len(ids)] = logits[:, : len(ids)]
        else:
            found[row] = logits
    return found
