"""The student: its architecture, its initial weights, and the parts of it that a loss uses.

It is a plain transformers model, so the saved directory loads everywhere. A student whose loss does not use
the vocabulary is an encoder without a masked-LM head.

Axes: B batch, L length, N positions, V vocabulary, D student's hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from infra.cpu.cpu_dropout import use_fast_dropout
from infra.errors import UserError
from infra.settings import sections
from offline_teacher.families import family_of
from offline_teacher.families.family import no_head
from offline_teacher.models.head import masked_lm_head
from offline_teacher.models.pooling import Pooling, pool
from offline_teacher.models.recording import QueriesKeysValues, projected
from offline_teacher.models.slicing import starting_weights
from offline_teacher.models.split import cut, encoder_mask
from offline_teacher.models.students import new_student, planned_student
from offline_teacher.models.weights import has_masked_lm_head
from student_train.objectives.relations import relation_heads

TeacherWeights = Mapping[str, Tensor]
"""Of the teacher, as `offline_teacher.models.weights.named_weights` names them."""


class StudentModel(nn.Module):
    """A transformers model and a projection to the teacher's width, saved where vectors of texts need it."""

    def __init__(self, model: Any, teacher_width: int, project: bool, pooling: Pooling | None = None) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        width = model.config.hidden_size
        different = project and width != teacher_width
        self.projection = nn.Linear(width, teacher_width, bias=False) if different else None
        self.flops_per_token = 0.0
        """Of a step, with its loss; 0 where it was not counted."""

    def body(self, input_ids: Tensor, token_count: Tensor | None) -> Tensor:
        """Last hidden states [B, L, D] of int64 ids [B, L]; ``token_count`` None: no row is padded."""
        return self._run(self.model.base_model, input_ids, token_count)

    def queries_keys_values(
        self, input_ids: Tensor, token_count: Tensor | None, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K, V of a layer, each [B, L, D]. What comes after these projections is not computed."""
        encoder, layer = self.model.base_model, layer % self.model.config.num_hidden_layers
        below = cut(encoder, 0, layer, embeddings=True, final_norm=False)
        return projected(encoder, layer, self._run(below, input_ids, token_count))

    def body_and_queries_keys_values(
        self, input_ids: Tensor, token_count: Tensor | None, layer: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """``body`` and ``queries_keys_values`` by one forward."""
        with QueriesKeysValues(self.model, layer) as recorder:
            return self.body(input_ids, token_count), recorder.take()

    def _run(self, encoder: Any, input_ids: Tensor, token_count: Tensor | None) -> Tensor:
        mask = encoder_mask(encoder.config, token_count, input_ids.shape[1], input_ids.device, self.dtype)
        hidden: Tensor = encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, in which the model computes."""
        return next(self.model.parameters()).dtype

    def head_transform(self, hidden: Tensor) -> Tensor:
        """The masked-LM head up to the decoder: [N, D] -> [N, D]."""
        return masked_lm_head(self.model).decoder_input(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        """[N, D] in the teacher's width, for the cosine; ``hidden`` itself where the widths agree."""
        return hidden if self.projection is None else self.projection(hidden)

    def vectors(self, hidden: Tensor, token_count: Tensor) -> Tensor:
        """A vector of each text, float32 [B, D_t], of hidden states [B, L, D], made as the teacher's is."""
        assert self.pooling is not None
        projected = self.project(pool(hidden, token_count, self.pooling).to(hidden.dtype)).float()
        return functional.normalize(projected, dim=-1) if self.pooling.normalise else projected

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
        if has_masked_lm_head(self.model):  # untied ones may have the bias twice, and readers differ
            module, _, _ = family_of(self.model.config).head.decoder.rpartition(".")
            other = getattr(self.model.get_submodule(module), "bias", None)
            if other is not None:
                other.data.copy_(self.decoder_bias)
        self.model.save_pretrained(directory)


def needs_head(train: sections.Train) -> bool:
    """Whether the loss looks at the vocabulary."""
    return train.alpha_ce > 0 or train.alpha_mlm > 0


def architecture(
    student: sections.Student,
    train: sections.Train,
    teacher_config: Mapping[str, Any],
    has_weights: bool,
) -> tuple[tuple[int, ...], PretrainedConfig]:
    """The teacher's layers that a student starts from, and the student's configuration.

    ``has_weights``: the store holds all of the teacher's weights. Raises UserError if the family is not
    supported, if a layer, a width or the relation heads do not fit, or if the store lacks weights that
    ``student.init`` needs.
    """
    if student.init == "teacher" and not has_weights:
        raise UserError(
            "student.init: teacher needs the teacher's weights, which the store does not hold"
            " (store.teacher_weights: false); set student.init: random"
        )
    layers, config = planned_student(student, teacher_config)
    if train.alpha_relation:
        relation_heads(_width(teacher_config), config.hidden_size, train.relation_heads)
        if not -len(layers) <= train.relation_layer < len(layers):
            raise UserError(
                f"train.relation_layer: there is no layer {train.relation_layer}; the student has"
                f" {len(layers)} layers"
            )
    return layers, config


def build_student(
    student: sections.Student,
    train: sections.Train,
    teacher_config: Mapping[str, Any],
    teacher_weights: TeacherWeights | None,
    pooling: Pooling | None = None,
) -> StudentModel:
    """A float32 student on the CPU, in training mode.

    Args:
        teacher_config: the store's teacher/config.json.
        teacher_weights: all of the store's; may be None where ``student.init`` is random.
        pooling: the teacher's, where the student learns vectors of texts.

    Raises:
        UserError: see ``architecture``; the loss needs a masked-LM head that the teacher has not; the weights
            lack a tensor or have one of another shape.
    """
    layers, config = architecture(student, train, teacher_config, teacher_weights is not None)
    start = None
    if student.init == "teacher":
        assert teacher_weights is not None
        if needs_head(train) and f"{family_of(teacher_config).head.dense}.weight" not in teacher_weights:
            raise no_head("the store's teacher")
        start = starting_weights(config, teacher_config, teacher_weights, layers)
    model = new_student(config, start, head=needs_head(train), seed=train.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        project = train.alpha_cos > 0 or train.alpha_embedding > 0
        built = StudentModel(model, _width(teacher_config), project, pooling)
    if student.dropout:
        use_fast_dropout(built.model)
    return built.train()


def _width(teacher_config: Mapping[str, Any]) -> int:
    width: int = family_of(teacher_config).config(teacher_config).hidden_size
    return width
