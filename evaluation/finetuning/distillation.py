"""The loss of a second distillation: a student is fine-tuned on labels and on a fine-tuned teacher's outputs.

    classification  CE(labels, q) + T^2 KL(p_T || q_T)
    spans           the mean of the classification losses of the start and the end position
    regression      (label - q)^2 + (p - q)^2, without T

Here p is the teacher's output and q the student's; p_T and q_T are softmax distributions at temperature T.
This is DistilBERT's "another step of distillation during the adaptation phase" (arXiv 1910.01108, section 3).
As in its code, both terms have the same weight (run_squad_w_distillation.py of
transformers-research-projects: 0.5 and 0.5 at T = 2). The factor T^2 keeps the gradients of both terms
comparable (Hinton et al. 2015, arXiv 1503.02531, section 2). For regression the second term is, up to a
factor, the KL between two Gaussians of the same fixed variance.

``soft_loss`` in ``evaluation.kinds`` computes the second term of every kind.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from evaluation.finetuning.jobs import SoftLabels
from evaluation.finetuning.teacher_outputs import read_outputs
from evaluation.finetuning.training import Loss
from evaluation.kinds.base import TEACHER_LOGITS, TOKEN_COUNTS
from evaluation.kinds.registry import kind_of
from evaluation.tasks.encoded import Encoded, Targets
from evaluation.tasks.task import Split, Task


def add_outputs(data: Encoded, task: Task, train: Split, soft_labels: SoftLabels, dtype: str) -> Encoded:
    """Returns ``data`` with two more targets: the teacher's stored outputs, and the number of tokens per row.
    Raises UserError if the outputs are missing, damaged, or of other rows."""
    logits = read_outputs(task, train, data, soft_labels, dtype)
    targets = data.targets | {TEACHER_LOGITS: logits, TOKEN_COUNTS: data.lengths().astype(np.int64)}
    return dataclasses.replace(data, targets=targets)


def distillation_loss(task: Task, temperature: float) -> Loss:
    """Returns (model output, targets) -> the sum of the two loss terms, averaged over the batch's rows."""
    kind = kind_of(task)

    def loss(output: Any, targets: Targets) -> torch.Tensor:
        return kind.loss(output, targets) + kind.soft_loss(output, targets, temperature)

    return loss
