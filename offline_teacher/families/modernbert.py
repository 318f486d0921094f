"""ModernBERT: pre-norm, rotary positions, and layers that see all positions or those of a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from offline_teacher.families.family import Family, HeadPaths

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ModernBert(Family):
    """Layer 0 has no norm before its attention and every other layer has one, so students begin with it."""

    def prepare(self, model: Any) -> None:
        """The rotary frequencies stay float32, whatever the model is converted to; see `rotary`."""
        from offline_teacher.families.rotary import Float32Rotary

        encoder = model.base_model
        device = next(encoder.final_norm.parameters()).device
        encoder.rotary_emb = Float32Rotary(encoder.config, None if device.type == "meta" else device)

    def attention_mask(
        self, config: Any, visible: Tensor | None, length: int, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """One mask for each type of layer: a window reaches ``local_attention // 2`` positions either way.

        Padded positions also see themselves, because not every kernel allows a position that sees nothing.
        """
        import torch

        everywhere = super().attention_mask(config, visible, length, device, dtype)
        reach = config.local_attention // 2
        if length <= reach + 1:
            return {"full_attention": everywhere, "sliding_attention": everywhere}
        position = torch.arange(length, device=device)
        distance = (position[:, None] - position).abs()  # [L, L]
        near = (distance <= reach)[None, None]
        local = near if everywhere is None else near & everywhere | (distance == 0)
        return {"full_attention": everywhere, "sliding_attention": local}

    def check_student(self, layers: Sequence[int], width: int, heads: int) -> None:
        super().check_student(layers, width, heads)
        if layers[0] != 0:
            raise UserError(
                f"student.layers: a ModernBERT student begins with layer 0, not {layers[0]}: that layer alone"
                " has no norm before its attention"
            )
        size = width // heads
        if size % 2:
            raise UserError(
                f"student.hidden_size: {width} over {heads} attention heads is {size}, an odd number,"
                " which rotary positions do not allow"
            )

    def student_fields(self, config: Any, layers: Sequence[int]) -> dict[str, Any]:
        """Keeps the attention type of each chosen layer; the default pattern would assign others."""
        types = [config.layer_types[layer] for layer in layers]
        return {**super().student_fields(config, layers), "layer_types": types}


MODERNBERT = ModernBert(
    model_type="modernbert",
    classes="ModernBert",
    prefix="model",
    layers="layers",
    projections=("attn.Wqkv",),
    head=HeadPaths("head.dense", "head.norm", "decoder", activation="classifier_activation"),
    words="embeddings.tok_embeddings",
    rotary=True,
    attention_norm="attn_norm",
    final_norm="final_norm",
    dropouts=("embedding_dropout", "attention_dropout", "mlp_dropout"),
)
