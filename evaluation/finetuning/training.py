"""Training and prediction on batches of tokenized rows of similar length, independent of tasks.

Axes: B rows of a batch, L tokens of the batch's longest row, n rows of a split.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from evaluation.finetuning.jobs import WARM_UP
from evaluation.finetuning.model_inputs import inputs_of
from evaluation.finetuning.vocabulary import reduced_vocabulary
from evaluation.tasks.encoded import Encoded, Targets
from infra.cpu.cpu_dropout import use_fast_dropout
from infra.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUCKET_BATCHES = 50
"""Rows are shuffled, then sorted by length within groups of this number of batches."""

Loss = Callable[[Any, Targets], torch.Tensor]
"""(output of the model's forward, the batch's targets) -> scalar loss, a mean over rows."""


@dataclass(frozen=True)
class Schedule:
    """Hyper-parameters of AdamW; the learning rate warms up linearly, then decays linearly to zero."""

    epochs: float
    batch_size: int
    learning_rate: float
    """Peak of the learning rate."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Precision of the forward pass."""
    max_grad_norm: float = 1.0
    max_steps: int | None = None

    def steps(self, rows: int) -> int:
        """Returns the number of steps on a training set of ``rows`` rows."""
        steps = max(1, math.ceil(self.epochs * math.ceil(rows / self.batch_size)))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rate(self, step: int, steps: int) -> float:
        """Returns the learning rate of step ``step`` (0, 1, ...) of ``steps``."""
        warmup = math.ceil(WARM_UP * steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (steps - step) / max(1, steps - warmup)


@dataclass(frozen=True)
class Fit:
    """Summary of a training run."""

    steps: int
    rows: int
    """Number of training rows over all steps."""
    seconds: float
    loss: float
    """Mean loss of the last tenth of the steps."""


def bucketed_batches(
    lengths: np.ndarray, batch_size: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Returns one epoch: batches, in random order, of indices of rows with similar lengths, int64 [B]."""
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * BUCKET_BATCHES):
        pool = order[start : start + batch_size * BUCKET_BATCHES]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    return [batches[number] for number in generator.permutation(len(batches))]


class Collator:
    """Makes padded batches of the inputs that a model's forward takes, on the model's device."""

    def __init__(self, model: torch.nn.Module, pad_id: int) -> None:
        self.select_inputs, self.pad_id = inputs_of(model), pad_id
        self.device = next(model.parameters()).device

    def inputs(self, data: Encoded, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Returns input_ids, attention_mask and, if the model takes them, token_type_ids, int64 [B, L].

        ``rows``: indices of the rows in ``data``, int64 [B].
        """
        shape = (len(rows), max(len(data.input_ids[row]) for row in rows))
        ids, mask, types = (np.full(shape, fill, np.int64) for fill in (self.pad_id, 0, 0))
        for slot, row in enumerate(rows):
            length = len(data.input_ids[row])
            ids[slot, :length] = data.input_ids[row]
            types[slot, :length] = data.token_type_ids[row]
            mask[slot, :length] = 1
        arrays = self.select_inputs({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def targets(self, data: Encoded, rows: np.ndarray) -> Targets:
        return {name: torch.from_numpy(array[rows]).to(self.device) for name, array in data.targets.items()}


def fit(
    model: PreTrainedModel,
    data: Encoded,
    loss_function: Loss,
    schedule: Schedule,
    seed: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> Fit:
    """Trains ``model`` in place and returns a summary.

    After every step ``advance`` is called with the number of rows in its batch. Raises UserError if the loss
    is not finite.
    """
    use_fast_dropout(model)
    with reduced_vocabulary(model, data.input_ids, pad_id) as input_ids:
        return _fit(model, replace(data, input_ids=input_ids), loss_function, schedule, seed, pad_id, advance)


def _fit(
    model: torch.nn.Module,
    data: Encoded,
    loss_function: Loss,
    schedule: Schedule,
    seed: int,
    pad_id: int,
    advance: Callable[[int], None],
) -> Fit:
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    collator = Collator(model, pad_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=0.0, fused=True)
    steps = schedule.steps(len(data))
    losses: list[torch.Tensor] = []
    rows_seen, started = 0, time.perf_counter()
    model.train()
    batches = _endless_batches(data.lengths(), schedule.batch_size, generator)
    for step, rows in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, steps)
        with _autocast(collator.device, schedule.dtype):
            loss = loss_function(model(**collator.inputs(data, rows)), collator.targets(data, rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        is_checked = (step + 1) % 50 == 0 or step + 1 == steps
        if is_checked and not torch.isfinite(torch.stack(losses[-50:])).all():
            problem = f"the loss is not finite by step {step + 1}; lower evaluation.learning_rate"
            raise UserError(f"fine-tuning: {problem}")
        rows_seen += len(rows)
        advance(len(rows))
    last_losses = losses[-max(1, steps // 10) :]
    return Fit(steps, rows_seen, time.perf_counter() - started, float(torch.stack(last_losses).mean()))


def _endless_batches(
    lengths: np.ndarray, batch_size: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    while True:
        yield from bucketed_batches(lengths, batch_size, generator)


def _autocast(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.inference_mode()
def predict(
    model: torch.nn.Module,
    data: Encoded,
    batch_size: int,
    dtype: str,
    pad_id: int,
    select_outputs: Callable[[Any, torch.Tensor], torch.Tensor] = lambda output, mask: output.logits,
) -> list[np.ndarray]:
    """Returns one float32 array per row of ``data``, in the same order: what ``select_outputs`` returns.

    ``select_outputs``: (output of the model's forward, attention mask [B, L]) -> [B, ...], by default the
    logits. An axis of L tokens includes the padding of the row's batch.
    """
    collator = Collator(model, pad_id)
    order = np.argsort(data.lengths(), kind="stable")
    by_row: list[np.ndarray] = [np.empty(0, np.float32)] * len(data)
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with _autocast(collator.device, dtype):
            inputs = collator.inputs(data, rows)
            outputs = select_outputs(model(**inputs), inputs["attention_mask"])
        for row, values in zip(rows, outputs.float().cpu().numpy(), strict=True):
            by_row[row] = values
    return by_row
