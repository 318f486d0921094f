"""Builds students of a teacher: their configuration, and the teacher's tensors that they start from.

Students are plain transformers models, so what is saved loads everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from infra.errors import UserError
from infra.settings.sections import Student
from offline_teacher.families import family_of
from offline_teacher.models.weights import load_named

DISTILBERT_LAYERS = (0, 2, 4, 7, 9, 11)
"""BERT-base's layers in DistilBERT (transformers-research-projects, distillation/scripts/extract.py)."""


@dataclass(frozen=True)
class Shape:
    """A student's widths. None: the teacher's; the feed-forward width shrinks with ``hidden_size``."""

    hidden_size: int | None = None
    attention_heads: int | None = None
    intermediate_size: int | None = None


def choose_layers(layers: str | Sequence[int], teacher: Any) -> tuple[int, ...]:
    """Teacher layers, counted from 0, in ascending order.

    ``every_second`` is 0, 2, 4, ... with the teacher's last layer as its last, because the head expects that
    layer's output (0, 2, 5 for 6 layers). For 12 layers it is the choice of DistilBERT's authors. ``last:N``
    are the last N layers. ``teacher`` is the teacher's configuration.

    Raises UserError where the teacher has fewer layers.
    """
    depth: int = family_of(teacher).config(teacher).num_hidden_layers
    if layers == "every_second":
        if depth == len(DISTILBERT_LAYERS) * 2:
            return DISTILBERT_LAYERS
        every = tuple(range(0, depth, 2))
        return (*every[:-1], depth - 1) if len(every) > 1 else every
    if isinstance(layers, str):
        count = int(layers.removeprefix("last:"))
        if count > depth:
            raise UserError(f"student.layers: {layers} is deeper than the teacher, which has {depth} layers")
        return tuple(range(depth - count, depth))
    if max(layers) >= depth:
        raise UserError(f"student.layers: there is no layer {max(layers)}; the teacher has 0 to {depth - 1}")
    return tuple(layers)


def student_config(
    teacher: Any, layers: Sequence[int], shape: Shape = Shape(), dropout: float = 0.1
) -> PretrainedConfig:
    """The configuration of a student. Raises UserError if its family allows no such layers or widths."""
    family = family_of(teacher)
    teacher = family.config(teacher)
    student = family.student_family(teacher)
    width = shape.hidden_size or teacher.hidden_size
    heads = shape.attention_heads or teacher.num_attention_heads
    student.check_student(layers, width, heads)
    wide = getattr(teacher, family.own_name("intermediate_size"))
    sizes = {
        "num_hidden_layers": len(layers),
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": shape.intermediate_size or wide * width // teacher.hidden_size,
    }
    fields = family.student_fields(teacher, layers)
    fields |= {student.own_name(name): size for name, size in sizes.items()}
    return student.config({**fields, **dict.fromkeys(student.dropouts, dropout)})


def planned_student(student: Student, teacher: Any) -> tuple[tuple[int, ...], PretrainedConfig]:
    """Returns the teacher's layers that a recipe's student starts from, and the student's configuration.
    Raises UserError if layers or widths do not fit the teacher."""
    layers = choose_layers(student.layers, teacher)
    shape = Shape(student.hidden_size, student.attention_heads, student.intermediate_size)
    config = student_config(teacher, layers, shape, student.dropout)
    if student.init == "teacher":
        require_slices(config, family_of(teacher).config(teacher))
    return layers, config


def widths(config: Any) -> tuple[int, int, int]:
    """Hidden size, feed-forward width, attention heads."""
    wide = getattr(config, family_of(config).own_name("intermediate_size"))
    return config.hidden_size, wide, config.num_attention_heads


def require_slices(student: Any, teacher: Any) -> None:
    """Raises UserError if such a student cannot start from slices of the teacher's layers."""
    names = ("hidden_size", "intermediate_size", "attention_heads")
    for name, own, most in zip(names, widths(student), widths(teacher), strict=True):
        if own > most:
            raise UserError(
                f"student.{name}: {own} is more than the teacher's {most}, and the student starts from the"
                " teacher's layers; set student.init: random"
            )
    (width, _, heads), (teacher_width, _, teacher_heads) = widths(student), widths(teacher)
    if heads != teacher_heads and width // heads != teacher_width // teacher_heads:
        raise UserError(
            f"student.attention_heads: {heads} heads of {width // heads} dimensions cannot be cut out of the"
            f" teacher's {teacher_heads} heads of {teacher_width // teacher_heads}; keep the teacher's number"
            " of heads or its dimensions per head, or set student.init: random"
        )


def student_weights(teacher: Any, weights: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """The student's tensors, by its own names and of the teacher's widths, out of the teacher's
    `weights.named_weights`. ``teacher`` is the teacher's configuration."""
    family = family_of(teacher)
    return family.student_tensors(family.config(teacher), weights, layers)


def new_student(
    config: PretrainedConfig, weights: Mapping[str, Tensor] | None, *, head: bool, seed: int = 0
) -> Any:
    """A student in float32 on the CPU, in training mode: a masked LM, or the encoder alone.

    ``weights``: of `student_weights`; None: random ones. A decoder that is not among them is tied to the word
    embeddings. UserError if they lack a tensor or have one of another shape.
    """
    family = family_of(config)
    config = family.config(config)
    if head and weights is not None:
        config.tie_word_embeddings = f"{family.head.decoder}.weight" not in weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.new_model(config, head)
    family.prepare(model)
    missing = [] if weights is None else load_named(model, weights)
    if missing:
        raise UserError(f"student.init: the teacher's weights lack {', '.join(missing[:3])}")
    return model.train()
