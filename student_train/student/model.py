"""The student: its architecture, its initial weights, and the outputs that a loss uses.

A student is a plain transformers model, so the saved directory loads everywhere. If its loss does not use the
vocabulary, it is an encoder without a masked-LM head.

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
from student_train.data.loss_needs import needs_head, relation_heads

TeacherWeights = Mapping[str, Tensor]
"""Parameter name -> tensor; the names are those of `offline_teacher.models.weights.named_weights`."""


class StudentModel(nn.Module):
    """A transformers model and, if the loss needs it, a projection to the teacher's width. Only a sentence
    encoder is published with its projection, by `sentence_files`: its embeddings need it."""

    def __init__(
        self, model: Any, teacher_width: int, compares: bool, pooling: Pooling | None = None
    ) -> None:
        """``compares``: whether the loss compares hidden states or embeddings with the teacher's."""
        super().__init__()
        self.model, self.pooling = model, pooling
        width = model.config.hidden_size
        needs_projection = compares and width != teacher_width
        self.projection = nn.Linear(width, teacher_width, bias=False) if needs_projection else None
        self.flops_per_token = 0.0
        """FLOP per token of a training step, with its loss; 0 until ``freeze_unreached`` counts them."""

    def body(self, input_ids: Tensor, token_count: Tensor | None) -> Tensor:
        """Returns the last hidden states [B, L, D] of int64 ids [B, L]. ``token_count`` int64 [B]: later
        positions are padding; None: no padding."""
        return self._run(self.model.base_model, input_ids, token_count)

    def queries_keys_values(
        self, input_ids: Tensor, token_count: Tensor | None, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values of a layer, each [B, L, D], and computes nothing above them. A
        negative ``layer`` counts from the top."""
        encoder, layer = self.model.base_model, layer % self.model.config.num_hidden_layers
        below = cut(encoder, 0, layer, embeddings=True, final_norm=False)
        return projected(encoder, layer, self._run(below, input_ids, token_count))

    def body_and_queries_keys_values(
        self, input_ids: Tensor, token_count: Tensor | None, layer: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Returns ``body`` and ``queries_keys_values`` from one forward."""
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
        """Returns the decoder's input [N, D]: the masked-LM head's transform of hidden states [N, D]."""
        return masked_lm_head(self.model).decoder_input(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        """Returns hidden states [N, D] as [N, teacher's width], projected if the widths differ."""
        return hidden if self.projection is None else self.projection(hidden)

    def text_embeddings(self, hidden: Tensor, token_count: Tensor) -> Tensor:
        """Returns the embeddings of texts, float32 [B, teacher's width], pooled as the teacher's are.
        ``hidden``: last hidden states [B, L, D]."""
        assert self.pooling is not None
        embeddings = self.project(pool(hidden, token_count, self.pooling).to(hidden.dtype)).float()
        return functional.normalize(embeddings, dim=-1) if self.pooling.normalise else embeddings

    @property
    def decoder_weight(self) -> Tensor:
        """[V, D]; the word embeddings themselves if the head is tied to them."""
        return masked_lm_head(self.model).decoder_weight

    @property
    def decoder_bias(self) -> Tensor:
        """[V]"""
        return masked_lm_head(self.model).decoder_bias

    def save(self, directory: str) -> None:
        """Writes weights (safetensors) and configuration by save_pretrained, without the projection."""
        if has_masked_lm_head(self.model):
            # Some heads hold the bias twice, and programs differ in which of the two they read.
            path, _, _ = family_of(self.model.config).head.decoder.rpartition(".")
            second_bias = getattr(self.model.get_submodule(path), "bias", None)
            if second_bias is not None:
                second_bias.data.copy_(self.decoder_bias)
        self.model.save_pretrained(directory)


def architecture(
    student: sections.Student, train: sections.Train, teacher_config: Mapping[str, Any], has_weights: bool
) -> tuple[tuple[int, ...], PretrainedConfig]:
    """Returns the numbers of the teacher's layers from which a student starts, and its configuration.

    ``has_weights``: whether the store holds all of the teacher's weights. Raises UserError if the teacher's
    family is not supported, if a layer, a width or the relation heads do not fit the teacher, or if
    ``student.init`` needs weights that the store lacks.
    """
    if student.init == "teacher" and not has_weights:
        raise UserError(
            "student.init is teacher, but the store does not hold the teacher's weights"
            " (store.teacher_weights: false); set student.init: random"
        )
    layers, config = planned_student(student, teacher_config)
    if train.alpha_relation:
        relation_heads(_width(teacher_config), config.hidden_size, train.relation_heads)
        layer, count = train.relation_layer, len(layers)
        if not -count <= layer < count:
            raise UserError(
                f"train.relation_layer: there is no layer {layer}; the student has {count} layers"
            )
    return layers, config


def build_student(
    student: sections.Student,
    train: sections.Train,
    teacher_config: Mapping[str, Any],
    teacher_weights: TeacherWeights | None,
    pooling: Pooling | None = None,
) -> StudentModel:
    """Returns a float32 student with its initial weights, on the CPU, in training mode.

    Args:
        teacher_config: the store's teacher/config.json.
        teacher_weights: all of the teacher's weights; may be None if ``student.init`` is random.
        pooling: the teacher's, if the loss compares embeddings of texts.

    Raises:
        UserError: see ``architecture``; or the loss needs a masked-LM head and the teacher has none; or a
            tensor of the weights is missing or has another shape.
    """
    layers, config = architecture(student, train, teacher_config, teacher_weights is not None)
    initial = None
    if student.init == "teacher":
        assert teacher_weights is not None
        if needs_head(train) and f"{family_of(teacher_config).head.dense}.weight" not in teacher_weights:
            raise no_head("the store's teacher")
        initial = starting_weights(config, teacher_config, teacher_weights, layers)
    model = new_student(config, initial, head=needs_head(train), seed=train.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        compares = train.alpha_cos > 0 or train.alpha_embedding > 0
        built = StudentModel(model, _width(teacher_config), compares, pooling)
    if student.dropout:
        use_fast_dropout(built.model)
    return built.train()


def _width(teacher_config: Mapping[str, Any]) -> int:
    """Returns the teacher's hidden size."""
    width: int = family_of(teacher_config).config(teacher_config).hidden_size
    return width
