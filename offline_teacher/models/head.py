"""The masked-LM head: logits = norm(act(h @ dense.T + b)) @ decoder.T + bias, for teachers and students.

All families here have this head. Biases of dense, norm and decoder are optional.
Axes: D hidden size, E the decoder's input width (D in all families here), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offline_teacher.families import family_of
from offline_teacher.families.family import no_head
from offline_teacher.models.weights import has_masked_lm_head

ALIGNED_ROWS = {"cuda": 64}
"""The decoder's rows are padded to a multiple of this number for fast matrix products: tensor cores read 16
bytes at once, and the 30,522 rows of BERT's vocabulary are not a multiple of that."""
ALIGNED_FROM = 4096
"""Smaller vocabularies get no extra rows, because they would not become faster."""


@dataclass(frozen=True)
class MaskedLmHead:
    """The modules of a model's head. They share their parameters with the model."""

    dense: nn.Linear
    activation: nn.Module
    norm: nn.LayerNorm
    decoder: nn.Linear

    def decoder_input(self, hidden: Tensor) -> Tensor:
        """Returns the decoder's input z [..., E], in the parameters' dtype, of hidden states [..., D]."""
        z: Tensor = self.norm(self.activation(self.dense(hidden.to(self.dense.weight.dtype))))
        return z

    def modules(self) -> list[nn.Module]:
        """Returns the modules that have parameters."""
        return [self.dense, self.norm, self.decoder]

    @property
    def decoder_weight(self) -> Tensor:
        """[V, E]; the word embeddings themselves if the decoder is tied to them."""
        return self.decoder.weight

    @property
    def decoder_bias(self) -> Tensor:
        """[V]; zeros if the decoder has no bias."""
        bias = self.decoder.bias
        return self.decoder.weight.new_zeros(self.decoder.weight.shape[0]) if bias is None else bias


def masked_lm_head(model: Any) -> MaskedLmHead:
    """Returns the head of a masked LM. Raises UserError if the model is an encoder without a head."""
    from transformers.activations import ACT2FN

    if not has_masked_lm_head(model):
        raise no_head(f"this {type(model).__name__}")
    paths = family_of(model.config).head
    name = "gelu" if paths.activation is None else getattr(model.config, paths.activation)
    dense, norm, decoder = (model.get_submodule(path) for path in (paths.dense, paths.norm, paths.decoder))
    return MaskedLmHead(dense=dense, activation=ACT2FN[name], norm=norm, decoder=decoder)


def aligned_decoder(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weight [V, E] and bias [V] of a decoder, padded to a multiple of ``ALIGNED_ROWS`` rows.

    Appended rows are zero, and their biases are so low that their probability is 0 at any temperature.
    """
    rows = ALIGNED_ROWS.get(weight.device.type, 1)
    extra = -len(weight) % rows if len(weight) >= ALIGNED_FROM else 0
    if not extra:
        return weight, bias
    lowest = torch.finfo(bias.dtype).min / 2  # half, so that the difference of two such numbers is finite
    return functional.pad(weight, (0, 0, 0, extra)), functional.pad(bias, (0, extra), value=lowest)
