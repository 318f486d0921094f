"""A tiny model of every family, with random weights of few bits, and the full model in float64 as an oracle.

The oracle is transformers' own class with its own masks, run whole; none of the package under test is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "vocab_size": 60,
    "pad_token_id": 1,
}
DISTILBERT_SIZES = {"dim": 16, "n_layers": 4, "n_heads": 4, "hidden_dim": 24}
IDS = dict.fromkeys(("bos_token_id", "cls_token_id"), 2) | dict.fromkeys(("eos_token_id", "sep_token_id"), 3)
MODELS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]] = {
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM, SIZES),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertForMaskedLM, DISTILBERT_SIZES | {
        name: SIZES[name] for name in ("max_position_embeddings", "vocab_size", "pad_token_id")
    }),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM, SIZES | {"type_vocab_size": 1}),
    "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaForMaskedLM, SIZES),
    "camembert": (transformers.CamembertConfig, transformers.CamembertForMaskedLM, SIZES),
    "modernbert": (
        transformers.ModernBertConfig,
        transformers.ModernBertForMaskedLM,
        SIZES | IDS | {"local_attention": 6},
    ),
    "mpnet": (transformers.MPNetConfig, transformers.MPNetForMaskedLM, SIZES),
}  # fmt: skip
FAMILIES = tuple(MODELS)


def masked_lm(family: str, seed: int = 0, **changes: Any) -> Any:
    """Float32. Every parameter, biases and norms too, is a random multiple of 1/256 below 1, so that sums and
    conversions of them are exact."""
    config_class, model_class, sizes = MODELS[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(sizes | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.3).clamp(-0.99, 0.99).mul(256).round() / 256)
    return model


def batch(
    length: int = 14, rows: tuple[int, ...] = (14, 9, 1), vocabulary: int = 60
) -> tuple[Tensor, Tensor]:
    """Ids [B, L] and token_count [B]; rows are padded to ``length``, one beyond any local window."""
    torch.manual_seed(7)
    ids, count = torch.randint(5, vocabulary, (len(rows), length)), torch.tensor(rows)
    return ids.where(torch.arange(length) < count[:, None], 1), count


@dataclass(frozen=True)
class Oracle:
    """What the full model gives in float64."""

    states: tuple[Tensor, ...]
    """Entering layer 0, 1, ..., and leaving the last: each [B, L, D]; no final norm."""
    last_hidden: Tensor
    """[B, L, D]; after the final norm."""
    logits: Tensor | None
    """[B, L, V]"""
    projected: list[tuple[Tensor, ...]]
    """Of each layer: the outputs of the query, key and value projections [B, L, D]."""


def layers(model: Any) -> Any:
    encoder = model.base_model
    if hasattr(encoder, "layers"):
        return encoder.layers
    return encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.transformer.layer


def projections(layer: nn.Module) -> tuple[nn.Module, ...]:
    """Query, key and value of one layer, by the names that the families give them."""
    names = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    for group in (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"), ("Wqkv",)):
        if group[0] in names:
            return tuple(names[name] for name in group)
    raise AssertionError("no projections")


@torch.no_grad()
def oracle(model: Any, ids: Tensor, token_count: Tensor) -> Oracle:
    """Of a fresh float64 copy of ``model``, which is not touched."""
    import copy

    whole = copy.deepcopy(model).double().eval()
    seen: dict[Any, Tensor] = {}
    for number, layer in enumerate(layers(whole)):
        layer.register_forward_hook(
            lambda _, given, out, n=number: seen.update({n: given[0], n + 1: _one(out)})
        )
        for module in projections(layer):
            module.register_forward_hook(lambda m, _, out: seen.update({m: out}))
    mask = (torch.arange(ids.shape[1]) < token_count[:, None]).long()
    out = whole(input_ids=ids, attention_mask=mask)
    logits = getattr(out, "logits", None)
    last = whole.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    projected = []
    for layer in layers(whole):
        outputs = tuple(seen[module] for module in projections(layer))
        projected.append(
            outputs if len(outputs) == 3 else outputs[0].split(outputs[0].shape[-1] // 3, dim=-1)
        )
    states = tuple(seen[number] for number in range(len(layers(whole)) + 1))
    return Oracle(states, last, logits, projected)


def _one(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
