"""The learning rate as a pure function of the step, so that a checkpoint need not hold a schedule."""

from __future__ import annotations

import math

from infra.settings.sections import Train


def learning_rate(train: Train, step: int, total: int) -> float:
    """Returns the learning rate of optimiser step ``step`` (from 0) of ``total``.

    The rate rises linearly over ``warmup_ratio * total`` steps. Then it falls to 0 linearly or as half a
    cosine, or stays constant, as in transformers' ``get_{linear,cosine,constant}_schedule_with_warmup``. Here
    the warm-up counts from 1, so the first step already has a rate above 0.
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
