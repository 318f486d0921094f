"""The frozen top of a teacher, run on hidden states from a store.

The attention of a replayed layer sees all positions below ``token_count``, or in ModernBERT's local layers
those within its window. Queries and keys for relations (MiniLMv2, arXiv 2012.15828) are the outputs of the
projections, in families with rotary positions before the rotation. The rotation only adds the distance of
positions, which teacher and student have in common. And it works within attention heads, while relation heads
may span several. `recording` takes the student's queries and keys at the same place.

Axes: B batch, L length, D hidden size, E the decoder's input width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import UserError
from offline_teacher.families import family_of
from offline_teacher.families.family import no_head
from offline_teacher.models.head import MaskedLmHead, masked_lm_head
from offline_teacher.models.recording import QueriesKeysValues, projected
from offline_teacher.models.split import cut, encoder_mask
from offline_teacher.models.weights import check_depth, filled, has_masked_lm_head, is_above


class Replay(nn.Module):
    """The top ``replay_layers`` layers and the head; always frozen and in evaluation mode.

    Every method computes only what it returns. Stored states h [B, L, D] may have any float dtype and are
    zero at padded positions. Results are computed and returned in the parameters' ``dtype``; at padded
    positions they are finite but meaningless. ``weights``: `weights.top_weights`, or more. Raises UserError
    if the family is not supported, the teacher has fewer layers, or a tensor is missing or of another shape.
    """

    def __init__(
        self,
        config: Any,
        weights: Mapping[str, Tensor],
        replay_layers: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        family = family_of(config)
        self.config, self.replay_layers = family.config(config), replay_layers
        check_depth(self.config, replay_layers)
        model, missing = filled(self.config, weights)
        missing = [name for name in missing if is_above(name, self.config, replay_layers)]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(f"the store's teacher weights lack {', '.join(missing[:3])}{more}")
        family.prepare(model)
        self._head = masked_lm_head(model) if has_masked_lm_head(model) else None
        self.head = nn.ModuleList(self._head.modules() if self._head else ())
        depth, encoder = self.config.num_hidden_layers, model.base_model
        first = depth - replay_layers
        self.encoder = (
            cut(encoder, first, depth, embeddings=False, final_norm=True) if replay_layers else None
        )
        self._below = [  # what comes before the second replayed layer, the third ...; no modules of their own
            cut(encoder, first, layer, embeddings=False, final_norm=False).eval()
            for layer in range(first + 1, depth)
        ]
        self.to(dtype).requires_grad_(False).eval()

    @torch.no_grad()
    def queries_keys_values(
        self, h: Tensor, token_count: Tensor | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K, V of one replayed layer, each [B, L, D], heads side by side; before any rotation.

        ``layer`` counts the replayed layers from the deepest, 0, whose three projections are all that is
        computed for it. Raises UserError where there is no such layer.
        """
        encoder = self._layers(layer)
        h = self._cast(h)
        if layer:
            h = self._run(self._below[layer - 1], h, token_count)
        return projected(encoder, layer, h)

    @torch.no_grad()
    def last_hidden(self, h: Tensor, token_count: Tensor | None = None) -> Tensor:
        """The head's input [B, L, D], the last hidden states; ``h`` itself if no layer is replayed."""
        return self._cast(h) if self.encoder is None else self._run(self.encoder, self._cast(h), token_count)

    def last_hidden_and_queries_keys_values(
        self, h: Tensor, token_count: Tensor | None = None, layer: int = 0
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """``last_hidden`` and ``queries_keys_values`` together; no projection is computed twice."""
        with QueriesKeysValues(self._layers(layer), layer) as recorder:
            return self.last_hidden(h, token_count), recorder.take()

    @torch.no_grad()
    def decoder_input(self, last_hidden: Tensor) -> Tensor:
        """z [..., E] of last hidden states [..., D]; logits are z @ decoder_weight.T + decoder_bias. This and
        the decoder raise UserError where the teacher has no masked-LM head."""
        return self._need_head().decoder_input(last_hidden)

    @property
    def decoder_weight(self) -> Tensor:
        """[V, E]"""
        return self._need_head().decoder_weight

    @property
    def decoder_bias(self) -> Tensor:
        """[V]"""
        return self._need_head().decoder_bias

    def train(self, mode: bool = True) -> Replay:
        """Does nothing, so that ``train()`` of a parent module does not end evaluation mode."""
        return super().train(False)

    def _layers(self, layer: int) -> Any:
        if self.encoder is None or not 0 <= layer < self.replay_layers:
            raise UserError(
                f"there is no replayed layer {layer}: the store has store.replay_layers {self.replay_layers};"
                " relations need a store with at least 1"
            )
        return self.encoder

    def _need_head(self) -> MaskedLmHead:
        if self._head is None:
            raise no_head(f"the store's teacher, a {self.config.model_type} encoder,")
        return self._head

    def _run(self, encoder: Any, h: Tensor, token_count: Tensor | None) -> Tensor:
        mask = encoder_mask(self.config, token_count, h.shape[1], h.device, h.dtype)
        hidden: Tensor = encoder(inputs_embeds=h, attention_mask=mask).last_hidden_state
        return hidden

    def _cast(self, h: Tensor) -> Tensor:
        parameter = next(self.parameters(), None)
        return h if parameter is None else h.to(parameter.dtype)
