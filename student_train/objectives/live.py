"""Runs the whole teacher in every training step, without stored outputs; for small jobs and comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError
from offline_teacher.families import family_of
from offline_teacher.models.split import lower
from offline_teacher.models.weights import load_named


class LiveTeacher:
    """The teacher below its replayed top layers; it computes the hidden states that a store would hold."""

    def __init__(self, config: Any, weights: Mapping[str, Tensor], replay_layers: int) -> None:
        """
        Args:
            config: the teacher's.
            weights: all of the teacher's, as `offline_teacher.models.weights.named_weights` names them.
            replay_layers: how many of the top layers are left to the replay.

        Raises:
            UserError: a tensor is missing or of another shape.
        """
        family = family_of(config)
        encoder = family.model_class(False)(family.config(config), **family.class_arguments(False))
        family.prepare(encoder)
        if missing := load_named(encoder, weights):
            raise UserError(f"train.teacher: live: the teacher's weights lack {', '.join(missing[:3])}")
        self._below = lower(encoder, replay_layers)

    def to(self, device: torch.device, dtype: torch.dtype) -> LiveTeacher:
        self._below.to(device, dtype)
        return self

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, token_count: Tensor | None) -> Tensor:
        """Hidden states [B, L, D] of int64 ids [B, L], in the teacher's dtype; zero at padded positions.

        ``token_count`` None: no row is padded.
        """
        hidden: Tensor = self._below(input_ids, token_count)
        return hidden
