"""MPNet: RoBERTa's layout with a relative position bias that all layers share. transformers computes its
attention eagerly, so its mask is added to the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offline_teacher.families.family import Family, HeadPaths

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MPNet(Family):
    def attention_mask(
        self, config: Any, visible: Tensor | None, length: int, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """0 where a position is seen, the lowest number elsewhere, [B, 1, 1, L]."""
        import torch

        if visible is None:
            visible = torch.ones(1, length, dtype=torch.bool, device=device)
        hidden = ~visible[:, None, None, :]
        seen = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return seen.masked_fill(hidden, torch.finfo(dtype).min)


MPNET = MPNet(
    model_type="mpnet",
    classes="MPNet",
    prefix="mpnet",
    layers="encoder.layer",
    projections=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    head=HeadPaths("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    has_pooler=True,
    attention="eager",
)
