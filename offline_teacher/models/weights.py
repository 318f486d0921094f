"""A model's tensors by name: which of them the top layers need, and loading them into another model.

Names are those that ``save_pretrained`` of the family's masked LM writes, also for the encoder alone. A
tensor with two names (word embeddings and a tied decoder, the decoder's bias) has only one of them here. The
tensors, not the configuration, decide what is tied. So the top and the other weights, as two files,
are a checkpoint that ``from_pretrained`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import UserError
from offline_teacher.families import family_of
from offline_teacher.families.family import Family


def has_masked_lm_head(model: Any) -> bool:
    """Whether a transformers model is a masked LM, not the encoder alone."""
    return model.base_model is not model


def named_weights(model: Any) -> dict[str, Tensor]:
    """All tensors of a masked LM or an encoder, but for a pooler's, contiguous and in the model's dtypes.

    They share the model's memory wherever they are contiguous in it.
    """
    family = family_of(model.config)
    start = "" if has_masked_lm_head(model) else f"{family.prefix}."
    tensors = {f"{start}{name}": tensor for name, tensor in model.state_dict().items()}
    for second, first in _second_names(family).items():
        pair = tensors.get(second), tensors.get(first)
        if pair[0] is not None and pair[1] is not None and pair[0].data_ptr() == pair[1].data_ptr():
            del tensors[second]
    pooler = f"{family.prefix}.pooler."
    return {name: tensor.contiguous() for name, tensor in tensors.items() if not name.startswith(pooler)}


def top_weights(model: Any, replay_layers: int) -> dict[str, Tensor]:
    """What `replay.Replay` needs: head, top layers, and what the layers share or is applied after them.

    With ``replay_layers`` 0, the head alone. A decoder that is tied to the word embeddings is there under
    their name. Raises UserError where the model has fewer layers.
    """
    check_depth(model.config, replay_layers)
    family, tensors = family_of(model.config), named_weights(model)
    decoder = f"{family.head.decoder}.weight"
    words = None if decoder in tensors or not has_masked_lm_head(model) else _second_names(family)[decoder]
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name == words or is_above(name, model.config, replay_layers)
    }


def check_depth(config: Any, replay_layers: int) -> None:
    """UserError unless 0 <= replay_layers <= the layers of ``config``."""
    depth = config.num_hidden_layers
    if not 0 <= replay_layers <= depth:
        raise UserError(f"store.replay_layers: {replay_layers} is not from 0 to the teacher's {depth} layers")


def load_named(model: nn.Module, weights: Mapping[str, Tensor], *, assign: bool = False) -> list[str]:
    """Puts `named_weights` into a model of that configuration, or into its encoder alone.

    Returns the names of tensors that the model has and ``weights`` do not. ``assign``: the given tensors
    become the parameters, as a model on the meta device needs. UserError where shapes are others.
    """
    config: Any = model.config
    family = family_of(config)
    tensors = dict(weights)
    for second, first in _second_names(family).items():
        for absent, present in ((second, first), (first, second)):
            if absent not in tensors and present in tensors:
                tensors[absent] = tensors[present]
    start = "" if has_masked_lm_head(model) else f"{family.prefix}."
    tensors = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    try:
        missing, _ = model.load_state_dict(tensors, strict=False, assign=assign)
    except RuntimeError as error:  # torch lists all that do not fit
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"the weights do not fit the configuration: {reason}") from None
    return [f"{start}{name}" for name in missing]


def filled(config: Any, weights: Mapping[str, Tensor]) -> tuple[Any, list[str]]:
    """A teacher whose parameters are these tensors, and the names of those that it lacks.

    It is a masked LM if there is a head among them. The parameters that are lacking take no memory.
    """
    family = family_of(config)
    with torch.device("meta"):
        model = family.new_model(config, head=f"{family.head.dense}.weight" in weights)
    return model, load_named(model, weights, assign=True)


def is_above(name: str, config: Any, replay_layers: int) -> bool:
    """Whether a tensor is of the head, of a replayed layer, or used by such layers in general."""
    family = family_of(config)
    if not name.startswith(f"{family.prefix}."):
        return True
    inside = name.removeprefix(f"{family.prefix}.")
    if replay_layers == 0 or inside.startswith("embeddings."):
        return False
    if inside.startswith(f"{family.layers}."):
        layer = int(inside.removeprefix(f"{family.layers}.").partition(".")[0])
        return layer >= config.num_hidden_layers - replay_layers
    return True


def _second_names(family: Family) -> dict[str, str]:
    """Names of the masked LM's tensors that transformers may tie, and of those it ties them to."""
    return dict(family.model_class(head=True)._tied_weights_keys)
