"""The second distillation: a student fine-tuned on a fine-tuned teacher's outputs beside the labels.

    classification  CE(labels) + T^2 KL(p_T || q_T)
    spans           the same of start and end, the mean of the two
    regression      (label - q)^2 + (teacher's value - q)^2, without T

This is DistilBERT's "another step of distillation during the adaptation phase" (arXiv 1910.01108, section 3).
As in its code, both terms have the same weight (run_squad_w_distillation.py of
transformers-research-projects: 0.5 and 0.5 at T = 2). The factor T^2 keeps their gradients comparable (Hinton
et al. 2015, arXiv 1503.02531, section 2). The regression's term is the KL between two Gaussians of the same
fixed width, up to a factor.

Axes: B batch, C classes, L tokens of the longest row of a batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from evaluation.finetuning.outputs_store import OutputsSpec, read_outputs
from evaluation.finetuning.training import Encoded, Loss, Targets
from evaluation.tasks.task import Split, Task
from infra.files import storage

TEACHER, TOKENS = "teacher", "tokens"
"""Names of the targets: logits float32 [B, *shape]; number of real tokens int64 [B]."""


def outputs_spec(task: Task, train: Split, data: Encoded, teacher: str, dtype: str) -> OutputsSpec:
    """The spec of stored outputs of the teacher with digest ``teacher`` for a training set.

    Start and end logits belong to tokens, so for them the windows ``data`` must be the same ones.
    """
    width = int(data.lengths().max())
    windows = repr((data.input_ids, data.token_type_ids)).encode() if task.kind == "spans" else b""
    return OutputsSpec(
        shape=(2, width) if task.kind == "spans" else (task.outputs,),
        rows=len(data),
        fingerprint={
            "task": task.name,
            "teacher": teacher,
            "data": train.digest(),
            "windows": storage.digest_bytes(windows),
            "dtype": dtype,
        },
    )


def add_outputs(data: Encoded, task: Task, train: Split, root: str, teacher: str, dtype: str) -> Encoded:
    """``data`` with the stored outputs as targets. UserError where they are damaged or of other rows."""
    logits = read_outputs(root, outputs_spec(task, train, data, teacher, dtype))
    assert len(logits) == len(data)
    targets = data.targets | {TEACHER: logits}
    if task.kind == "spans":
        targets[TOKENS] = data.lengths().astype(np.int64)
    return dataclasses.replace(data, targets=targets)


def distilled(task: Task, labels_loss: Loss, temperature: float) -> Loss:
    """The loss of the module's docstring, a mean over rows."""

    def classes(output: Any, targets: Targets) -> torch.Tensor:
        return kl(output.logits.float(), targets[TEACHER], temperature)

    def value(output: Any, targets: Targets) -> torch.Tensor:
        return functional.mse_loss(output.logits.float(), targets[TEACHER])

    def spans(output: Any, targets: Targets) -> torch.Tensor:
        width = output.start_logits.shape[1]
        padding = torch.arange(width, device=output.start_logits.device) >= targets[TOKENS][:, None]
        found = [
            kl(
                student.float().masked_fill(padding, -1e4),
                targets[TEACHER][:, side, :width].masked_fill(padding, -1e4),
                temperature,
            )
            for side, student in enumerate((output.start_logits, output.end_logits))
        ]
        return (found[0] + found[1]) / 2

    term = {"classification": classes, "regression": value, "spans": spans}[task.kind]
    return lambda output, targets: labels_loss(output, targets) + term(output, targets)


def kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [B, C], the mean over B."""
    p, q = (functional.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * functional.kl_div(q, p, reduction="batchmean", log_target=True)
