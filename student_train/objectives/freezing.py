"""Finds the parameters that the loss reaches, freezes the others, and counts the FLOP of a training step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from offline_teacher.store.schema import Layout
from student_train.data.collate import collate
from student_train.objectives.objective import Objective
from student_train.student.model import StudentModel

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CPU_ATTENTION = {
    _ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _BACKWARD: lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v),
}
"""FLOP formulas, given the shapes, of operations that torch's counter does not know."""


def freeze_unreached(model: StudentModel, objective: Objective) -> float:
    """Freezes every parameter that no loss term reaches. Returns the FLOP per token of a training step.

    The gradients of one synthetic sample show which parameters are reached. The model and the replayed layers
    must be on the CPU. Only matrix products of forward and backward count, without those of a live teacher.
    """
    layout = objective.layout
    masked_only, bfloat16 = layout.positions == "masked", layout.hidden_states == "bfloat16"
    batch = collate(_sample(layout), masked_only, bfloat16, weight=1.0)
    objective = replace(objective, train=replace(objective.train, compile=False), live=None)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        objective(model, batch, token_total=batch.tokens, masked_total=max(1, batch.masked)).total.backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None
    return counter.get_total_flops() / batch.tokens


def frozen_parameters(model: StudentModel) -> dict[str, Tensor]:
    """Returns copies of the frozen parameters, by name, in their current dtype and on their device."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def _sample(layout: Layout) -> dict[str, np.ndarray]:
    """Returns the columns [1, ...] of one sample without padding: zeros, with all masked positions used."""
    described = layout.data_columns().items()
    columns = {name: np.zeros((1, *column.shape), column.dtype) for name, column in described}
    columns["token_count"][:] = layout.length
    if layout.masked:
        columns["masked_positions"][:] = np.arange(layout.masked)
    return columns
