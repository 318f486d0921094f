"""A teacher split below its top layers: the part that the pass runs, and the part that `replay` runs.

Both parts are the transformers encoder with some modules left out, so embeddings, masks, positions and
attention are those of transformers. Parameters are shared with the original model, not copied, so moving one
to another dtype or device also moves the other. Which tensors are stored with the top: `weights.top_weights`.

Axes: B batch, L length, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import UserError
from offline_teacher.families import family_of
from offline_teacher.models.weights import check_depth, load_named


def visible_positions(token_count: Tensor | None, length: int, device: torch.device) -> Tensor | None:
    """bool [B, L] on ``device``: True before ``token_count`` [B]; None if no row is padded (see
    `offline_teacher.models`). Counts on a GPU are not read, since that would wait for the device."""
    if token_count is None or (token_count.device.type == "cpu" and bool((token_count >= length).all())):
        return None
    return torch.arange(length, device=device) < token_count.to(device, non_blocking=True)[:, None]


def encoder_mask(
    config: Any, token_count: Tensor | None, length: int, device: torch.device, dtype: torch.dtype
) -> Any:
    """The ``attention_mask`` for an encoder of any family; the encoder computes in ``dtype``."""
    visible = visible_positions(token_count, length, device)
    return family_of(config).attention_mask(config, visible, length, device, dtype)


class Lower(nn.Module):
    """The encoder up to its top layers, frozen and in evaluation mode."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)

    def forward(self, input_ids: Tensor, token_count: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] of int64 ids [B, L], in the parameters' dtype; zero at padded positions."""
        length, device = input_ids.shape[1], input_ids.device
        visible = visible_positions(token_count, length, device)
        config, dtype = self.encoder.config, self.encoder.dtype
        mask = family_of(config).attention_mask(config, visible, length, device, dtype)
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden if visible is None else hidden.masked_fill(~visible[..., None], 0)


def lower_part(model: Any, replay_layers: int) -> Lower:
    """The lower part of a masked LM or an encoder: it computes the hidden states that enter the top layers.

    ``replay_layers`` 0: the encoder's output, which the head takes (pre-norm families: after the final norm).
    Otherwise: the output of the last kept layer (pre-norm families: the residual stream, not normalised). The
    parameters are shared with ``model``, which becomes frozen. Raises UserError if it has fewer layers.
    """
    check_depth(model.config, replay_layers)
    stop = model.config.num_hidden_layers - replay_layers
    return Lower(cut(model.base_model, 0, stop, embeddings=True, final_norm=replay_layers == 0))


def lower_part_from_weights(config: Any, weights: Mapping[str, Tensor], replay_layers: int) -> Lower:
    """`lower_part` of a stored teacher. ``weights``: all of its tensors, named as `named_weights` does.
    Raises UserError if a tensor is missing or has another shape."""
    family = family_of(config)
    encoder = family.new_model(config, head=False)
    family.prepare(encoder)
    if missing := load_named(encoder, weights):
        raise UserError(f"the store's teacher weights lack {', '.join(missing[:3])}")
    return lower_part(encoder, replay_layers)


def cut(encoder: Any, start: int, stop: int, *, embeddings: bool, final_norm: bool) -> Any:
    """The encoder with layers [start, stop) only, and no pooler. Without ``embeddings`` it takes
    hidden states [B, L, D] as ``inputs_embeds``, which enter the first of its layers as they are."""
    family = family_of(encoder.config)
    replacements: dict[str, nn.Module | None] = {
        family.layers: nn.ModuleList(encoder.get_submodule(family.layers)[start:stop])
    }
    if not embeddings:
        replacements["embeddings"] = _HiddenStates()
    if family.final_norm is not None and not final_norm:
        replacements[family.final_norm] = nn.Identity()
    if getattr(encoder, "pooler", None) is not None:
        replacements["pooler"] = None
    return _with_modules(encoder, replacements)


class _HiddenStates(nn.Module):
    """Replaces the embeddings: returns the given hidden states unchanged."""

    def forward(
        self, input_ids: Any = None, inputs_embeds: Any = None, position_ids: Any = None, **others: Any
    ) -> Tensor:
        hidden: Tensor = inputs_embeds
        return hidden


def _with_modules(module: nn.Module, replacements: Mapping[str, nn.Module | None]) -> nn.Module:
    """A shallow copy of ``module`` with the submodules at these dotted paths replaced; all else is shared."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    for path, new in replacements.items():
        name, _, rest = path.partition(".")
        inner = copied._modules[name]
        copied._modules[name] = _with_modules(inner, {rest: new}) if rest and inner is not None else new
    return copied
