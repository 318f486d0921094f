"""The student: its architecture, where its weights start, and the pieces of it that a loss needs.

It is a plain transformers model, so what is saved loads everywhere. A student whose loss never looks at the
vocabulary is an encoder without a masked-LM head.

Axes: B batch, L length, N positions, V vocabulary, D student's hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from infra import sections
from infra.cpu_dropout import use_cheap_dropout
from infra.errors import UserError
from offline_teacher.families.head import masked_lm_head
from offline_teacher.families.masks import encoder_mask
from offline_teacher.families.recording import QueriesKeysValues
from offline_teacher.families.students import (
    Shape,
    choose_layers,
    new_student,
    student_config,
    student_weights,
)

TeacherWeights = Mapping[str, Tensor]
"""Of the teacher, as `offline_teacher.families.weights.named_weights` names them."""


class StudentModel(nn.Module):
    """A transformers model, plus the projection that is trained for the cosine but not saved."""

    def __init__(self, model: Any, teacher_width: int, project: bool) -> None:
        super().__init__()
        self.model = model
        width = model.config.hidden_size
        different = project and width != teacher_width
        self.projection = nn.Linear(width, teacher_width, bias=False) if different else None

    def body(self, input_ids: Tensor, token_count: Tensor | None) -> Tensor:
        """Last hidden states [B, L, D] of int64 ids [B, L]; ``token_count`` None: no row is padded."""
        dtype = next(self.model.parameters()).dtype
        mask = encoder_mask(self.model.config, token_count, input_ids.shape[1], input_ids.device, dtype)
        hidden: Tensor = self.model.base_model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden

    def recorder(self, layer: int) -> QueriesKeysValues:
        """Keeps queries, keys and values of a layer in every ``body``. UserError for a layer it lacks."""
        depth = self.model.config.num_hidden_layers
        if not -depth <= layer < depth:
            raise UserError(
                f"train.relation_layer: there is no layer {layer}; the student has {depth} layers"
            )
        return QueriesKeysValues(self.model, layer)

    def head_transform(self, hidden: Tensor) -> Tensor:
        """The masked-LM head up to the decoder: [N, D] -> [N, D]."""
        return masked_lm_head(self.model).decoder_input(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        """[N, D] in the teacher's width, for the cosine; ``hidden`` itself where the widths agree."""
        return hidden if self.projection is None else self.projection(hidden)

    @property
    def decoder_weight(self) -> Tensor:
        """[V, D], the word embeddings themselves where they are tied."""
        return masked_lm_head(self.model).decoder_weight

    @property
    def decoder_bias(self) -> Tensor:
        """[V]"""
        return masked_lm_head(self.model).decoder_bias

    def save(self, directory: str) -> None:
        """Weights (safetensors) and configuration in save_pretrained layout; the projection stays out."""
        self.model.save_pretrained(directory)


def needs_head(train: sections.Train) -> bool:
    """Whether the loss looks at the vocabulary."""
    return train.alpha_ce > 0 or train.alpha_mlm > 0


def build_student(
    student: sections.Student,
    train: sections.Train,
    teacher_config: Mapping[str, Any],
    teacher_weights: TeacherWeights | None,
) -> StudentModel:
    """A float32 student on the CPU, in training mode.

    Args:
        teacher_config: the store's teacher/config.json.
        teacher_weights: of the store; may be None where ``student.init`` is random.

    Raises:
        UserError: the family is not supported; a layer or a width does not fit; the store lacks some of the
            teacher's weights.
    """
    layers = choose_layers(student.layers, teacher_config)
    config = student_config(teacher_config, layers, Shape(hidden_size=student.hidden_size), student.dropout)
    start = None
    if student.init == "teacher":
        if teacher_weights is None:
            raise UserError(
                "student.init: teacher needs the teacher's weights, which the store does not hold"
                " (store.teacher_weights: false); set student.init: random"
            )
        start = student_weights(teacher_config, teacher_weights, layers)
    model = new_student(config, start, head=needs_head(train), seed=train.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        built = StudentModel(model, _width(teacher_config), project=train.alpha_cos > 0)
    if student.dropout:
        use_cheap_dropout(built.model)
    return built.train()


def _width(teacher_config: Mapping[str, Any]) -> int:
    from offline_teacher.families import family_of

    width: int = family_of(teacher_config).config(teacher_config).hidden_size
    return width
