"""The learning rate as a pure function of the step, so that a checkpoint need not hold a schedule."""

from __future__ import annotations

import math
import re

from infra.settings.sections import Train

_LAYER = re.compile(r"\blayers?\.(\d+)\.")
"""The number of a parameter's layer in its name, in all families of teachers."""


def layer_scales(names: list[str], decay: float) -> dict[str, float]:
    """Returns the factor of the learning rate of each parameter: decay^d for a parameter d layers below the
    head, as in ELECTRA (arXiv 2003.10555, appendix B). d is 0 for the head and everything else outside layers
    and embeddings, 1 for the last of n layers, n for the first, and n + 1 for the embeddings."""
    layer_of = {name: int(match[1]) for name in names if (match := _LAYER.search(name))}
    count = max(layer_of.values(), default=-1) + 1
    depths = {name: count + 1 if "embeddings." in name else 0 for name in names}
    depths |= {name: count - layer for name, layer in layer_of.items()}
    return {name: decay**depth for name, depth in depths.items()}


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
