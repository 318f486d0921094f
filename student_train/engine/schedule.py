"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from infra.settings.sections import Train


def learning_rate(train: Train, step: int, total: int) -> float:
    """The rate of optimiser step ``step`` (0-based) of ``total``.

    Linear warm-up over ``warmup_ratio * total`` steps, then linear to 0 at ``total``, half a cosine to 0,
    or constant, as ``get_{linear,cosine,constant}_schedule_with_warmup`` of transformers; but the first
    step already moves: the warm-up counts from 1.
    """
    warmup = math.ceil(train.warmup_ratio * total)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[train.schedule]
    return train.learning_rate * factor
