"""Which parameters of a student its loss reaches: the others are frozen, and stay as they began."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from offline_teacher.store.schema import Layout
from student_train.data.collate import collate
from student_train.objectives.objective import Objective
from student_train.student.model import StudentModel


def freeze_unreached(model: StudentModel, objective: Objective) -> list[str]:
    """Freezes every parameter that gets no gradient from one made-up sample; their names.

    Which parameters a loss reaches follows from its terms alone, not from the sample. The model and what the
    objective replays must be on the CPU. Gradients are cleared again.
    """
    layout = objective.layout
    batch = collate(
        _sample(layout), layout.positions == "masked", layout.hidden_states == "bfloat16", weight=1.0
    )
    objective = replace(objective, train=replace(objective.train, compile=False))
    objective(model, batch, tokens=batch.tokens, masked=max(1, batch.masked)).total.backward()
    unreached = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
            unreached.append(name)
        parameter.grad = None
    return unreached


def frozen_parameters(model: StudentModel) -> dict[str, Tensor]:
    """Copies of the frozen parameters, by name, in the dtype and on the device they have now."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def _sample(layout: Layout) -> dict[str, np.ndarray]:
    """The columns of one sample of this layout, without padding: zeros, and one masked token."""
    columns = {
        name: np.zeros((1, *column.shape), column.dtype) for name, column in layout.data_columns().items()
    }
    columns["token_count"][:] = layout.length
    if layout.masked:
        columns["masked_positions"][:] = -1
        columns["masked_positions"][:, 0] = 0
    return columns
