"""The teacher's masked-LM head, kept once in a store: hidden states + head = the full distribution."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from offline_teacher.store.sealed import canonical

HEAD_NAME = "teacher/mlm_head.safetensors"
METADATA_KEY = "mlm_head"


@dataclass(frozen=True)
class MlmHead:
    """logits = LN(act(h @ dense.T + b)) @ decoder.T + bias, as in BERT and RoBERTa; all arrays float32."""

    dense_weight: np.ndarray
    """[D, D]"""
    dense_bias: np.ndarray
    """[D]"""
    layer_norm_weight: np.ndarray
    """[D]"""
    layer_norm_bias: np.ndarray
    """[D]"""
    decoder_weight: np.ndarray
    """[V, D]"""
    decoder_bias: np.ndarray
    """[V]"""
    hidden_act: str
    """The name transformers gives the activation: gelu, gelu_new, relu, silu ..."""
    layer_norm_eps: float

    def __post_init__(self) -> None:
        (V, D) = self.decoder_weight.shape  # noqa: N806
        shapes = {"dense_weight": (D, D), "dense_bias": (D,), "decoder_weight": (V, D), "decoder_bias": (V,)}
        shapes |= {"layer_norm_weight": (D,), "layer_norm_bias": (D,)}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(
                    f"{name}: must be float32 {list(shape)}, not {array.dtype} {list(array.shape)}"
                )

    def transform(self, hidden: np.ndarray) -> np.ndarray:
        """z [N, D] of hidden states [N, D], in the dtype of ``hidden`` (float32 or float64)."""
        x = hidden @ self.dense_weight.T.astype(hidden.dtype) + self.dense_bias.astype(hidden.dtype)
        x = _activation(self.hidden_act)(x)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + hidden.dtype.type(self.layer_norm_eps))
        return x * self.layer_norm_weight.astype(hidden.dtype) + self.layer_norm_bias.astype(hidden.dtype)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """[N, V] of hidden states [N, D], in their dtype. The caller chunks N."""
        z = self.transform(hidden)
        return z @ self.decoder_weight.T.astype(z.dtype) + self.decoder_bias.astype(z.dtype)


def head_bytes(head: MlmHead) -> bytes:
    """The safetensors file. Its metadata has a single key: the order of several is not deterministic."""
    words = {"hidden_act": head.hidden_act, "layer_norm_eps": head.layer_norm_eps}
    tensors = {name: np.ascontiguousarray(getattr(head, name)) for name in _tensor_names()}
    return save(tensors, metadata={METADATA_KEY: canonical(words).decode()})


def parse_head(data: bytes) -> MlmHead:
    """ValueError where the bytes are not a head file."""
    try:
        tensors: dict[str, Any] = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        values: dict[str, Any] = json.loads(header["__metadata__"][METADATA_KEY])
        return MlmHead(**values, **{name: tensors[name] for name in _tensor_names()})
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"is not a masked-LM head ({error})") from None


def _tensor_names() -> list[str]:
    return [field.name for field in fields(MlmHead) if field.name not in ("hidden_act", "layer_norm_eps")]


def _activation(name: str) -> Any:
    known = {
        "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
        "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "swish": lambda x: x / (1 + np.exp(-x)),
        "tanh": np.tanh,
        "linear": lambda x: x,
    }
    known["gelu_pytorch_tanh"] = known["gelu_new"]
    if name not in known:
        raise ValueError(f"hidden_act: {name!r} is not one of {', '.join(sorted(known))}")
    return known[name]


_erf_scalar = np.frompyfunc(math.erf, 1, 1)


def _erf(x: np.ndarray) -> np.ndarray:
    return _erf_scalar(x).astype(x.dtype)
