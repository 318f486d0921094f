"""Runs the trainer with renormalised soft targets, as other programs use them.

    python -m tests.benchmarks.compare.renormalised --recipe RECIPE

The top-k probabilities are divided by their sum, as if no other token were possible.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from student_train import main as trainer
from student_train.objectives import objective
from student_train.objectives.soft_targets import TopkTarget

exact_tail = objective.topk_target


def renormalised(*arguments: object, **names: object) -> TopkTarget:
    """Returns the stored top k of N positions with probabilities that sum to 1."""
    target = exact_tail(*arguments, **names)  # type: ignore[arg-type]
    kept = torch.logsumexp(target.topk_logits.float() / target.temperature, dim=1)
    return replace(target, logsumexp=kept)


if __name__ == "__main__":
    objective.topk_target = renormalised
    trainer.main()
