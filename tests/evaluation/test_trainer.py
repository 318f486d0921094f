"""Fine-tuning against ``transformers.Trainer``, which has the optimiser and the losses that people expect."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.candidates.models import Candidate, load_model, load_tokenizer
from evaluation.finetuning import training
from evaluation.finetuning.training import Schedule
from evaluation.kinds.registry import kind_of
from evaluation.sources.catalogue import find_task
from evaluation.tasks.encoded import Encoded

SEED, ROWS, SIZE, EPOCHS, RATE = 3, 48, 8, 3, 3e-3


def without_dropout(encoder: str) -> Any:
    model = load_model(Candidate("m", encoder), find_task("SST-2"), SEED)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_without_warm_up_and_dropout_the_weights_are_the_trainers(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same batches: optimiser, decay of the learning rate, gradient clipping and loss are the same."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    monkeypatch.setattr(training, "WARM_UP", 0.0)
    generator = np.random.default_rng(0)
    rows = [[2, *generator.integers(5, 17, generator.integers(1, 9)).tolist(), 3] for _ in range(ROWS)]
    data = Encoded(rows, [[0] * len(row) for row in rows], {"label": generator.integers(0, 2, ROWS)})
    ours, theirs = without_dropout(encoder), without_dropout(encoder)
    before = {name: weight.detach().clone() for name, weight in ours.named_parameters()}
    fitted = training.fit(ours, data, kind_of(find_task("SST-2")).loss, Schedule(EPOCHS, SIZE, RATE), SEED, 0)

    batches = training._endless_batches(data.lengths(), SIZE, np.random.default_rng(SEED))
    order = np.concatenate(list(itertools.islice(batches, fitted.steps)))
    labels = data.targets["label"].tolist()
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=SIZE, learning_rate=RATE,
        train_sampling_strategy="sequential", report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    dataset = [
        {"input_ids": rows[row], "attention_mask": [1] * len(rows[row]), "label": labels[row]}
        for row in order
    ]
    collator = DataCollatorWithPadding(load_tokenizer(encoder))
    run = Trainer(theirs, arguments, train_dataset=dataset, data_collator=collator)
    assert run.train().global_step == fitted.steps == EPOCHS * ROWS // SIZE

    found = dict(ours.named_parameters())
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=5e-6)
    moved = max(float((found[name].detach() - before[name]).abs().max()) for name in before)
    assert moved > 10 * RATE / 2  # far more than the tolerance
