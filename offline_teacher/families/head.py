"""The masked-LM head: logits = norm(act(h @ dense.T + b)) @ decoder.T + bias, for teachers and students.

All families here have this head. Biases of dense, norm and decoder are optional.
Axes: D hidden size, E the decoder's input width (D in all families here), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from offline_teacher.families import family_of
from offline_teacher.families.family import no_head
from offline_teacher.families.weights import has_masked_lm_head


@dataclass(frozen=True)
class MaskedLmHead:
    """The modules of a model's head; their parameters stay the model's."""

    dense: nn.Linear
    activation: nn.Module
    norm: nn.LayerNorm
    decoder: nn.Linear

    def decoder_input(self, hidden: Tensor) -> Tensor:
        """z [..., E] of last hidden states [..., D] of any float dtype, in the dtype of the parameters."""
        z: Tensor = self.norm(self.activation(self.dense(hidden.to(self.dense.weight.dtype))))
        return z

    def modules(self) -> list[nn.Module]:
        """Those with parameters."""
        return [self.dense, self.norm, self.decoder]

    @property
    def decoder_weight(self) -> Tensor:
        """[V, E]; the word embeddings themselves where they are tied."""
        return self.decoder.weight

    @property
    def decoder_bias(self) -> Tensor:
        """[V]; zeros where the decoder has no bias."""
        bias = self.decoder.bias
        return self.decoder.weight.new_zeros(self.decoder.weight.shape[0]) if bias is None else bias


def masked_lm_head(model: Any) -> MaskedLmHead:
    """The head of a masked LM. UserError where the model is an encoder alone."""
    from transformers.activations import ACT2FN

    if not has_masked_lm_head(model):
        raise no_head(f"this {type(model).__name__}")
    paths = family_of(model.config).head
    name = "gelu" if paths.activation is None else getattr(model.config, paths.activation)
    dense, norm, decoder = (model.get_submodule(path) for path in (paths.dense, paths.norm, paths.decoder))
    return MaskedLmHead(dense=dense, activation=ACT2FN[name], norm=norm, decoder=decoder)
