"""A masked-LM head made of given tensors, with the interface `objectives.soft_targets.Decoder`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Head:
    """logits = norm(gelu(dense(hidden))) @ decoder.T + bias."""

    dense_weight: Tensor
    dense_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    decoder_weight: Tensor
    decoder_bias: Tensor

    def to(self, dtype: torch.dtype) -> Head:
        return Head(*(getattr(self, field.name).detach().to(dtype) for field in fields(self)))

    def decoder_input(self, last_hidden: Tensor) -> Tensor:
        x = functional.linear(last_hidden.to(self.dense_weight.dtype), self.dense_weight, self.dense_bias)
        x = functional.gelu(x)
        return functional.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias, 1e-12)


def random_head(d: int, v: int, seed: int = 0) -> Head:
    """Returns a float64 head whose logits have a realistic spread."""
    random = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    return Head(r(d, d), r(d), 1 + 0.1 * r(d), r(d), 0.5 * r(v, d), r(v))
