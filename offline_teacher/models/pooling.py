"""Pooling of a sentence encoder: hidden states to one vector, as its sentence-transformers files say.

Axes: B batch, L length, D hidden size. Reading needs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from infra.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["mean", "cls"]
MODES: dict[str, Mode] = {
    "mean": "mean",
    "cls": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
"""Name in 1_Pooling/config.json -> mode. Newer files name the mode; older ones have a switch for each."""


@dataclass(frozen=True)
class Pooling:
    """One vector of a text's hidden states."""

    mode: Mode
    """The mean over the real tokens, special ones included, or the first token's."""
    normalise: bool
    """Whether the vector is scaled to length 1."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Name of a purpose -> prompt, which is put before a text."""
    default_prompt: str | None = None
    """Name of the one that is put before every text unless another is asked for."""
    max_length: int | None = None
    """Tokens, special ones included, after which the encoder's users cut a text. None: not recorded."""

    @property
    def prompt(self) -> str:
        return "" if self.default_prompt is None else self.prompts.get(self.default_prompt, "")


def read_pooling(directory: str) -> Pooling | None:
    """The pooling of a sentence encoder's directory; None for other models, which have no modules.json.
    Raises UserError if the pooling is not supported."""
    if not os.path.isfile(os.path.join(directory, "modules.json")):
        return None
    where = f"teacher.model: {directory}"
    folder, normalise = _modules(directory)
    settings = _read(directory, "config_sentence_transformers.json", dict)
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise UserError(f"{where}/config_sentence_transformers.json: prompts is no mapping of names to texts")
    longest = _read(directory, "sentence_bert_config.json", dict).get("max_seq_length")
    if longest is not None and not isinstance(longest, int):
        raise UserError(f"{where}/sentence_bert_config.json: max_seq_length is {longest!r}, not a number")
    pooled = _read(directory, os.path.join(folder, "config.json"), dict, needed=True)
    if any(prompts.values()) and not pooled.get("include_prompt", True):
        raise UserError(f"{where}/{folder} leaves the prompt out of the mean, which is not supported")
    return Pooling(
        mode=_mode(pooled, f"{where}/{folder}"),
        normalise=normalise,
        prompts=prompts,
        default_prompt=settings.get("default_prompt_name"),
        max_length=longest,
    )


def pool(hidden: Tensor, token_count: Tensor, pooling: Pooling) -> Tensor:
    """One vector of each text [B, D], of last hidden states [B, L, D] and token_count int [B], at least 1.

    It is computed and returned in float32, or in float64 where ``hidden`` is float64.
    """
    import torch
    from torch.nn import functional

    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling.mode == "cls":
        pooled = hidden[:, 0]
    else:
        count = token_count.to(hidden.device)[:, None]
        real = torch.arange(hidden.shape[1], device=hidden.device) < count  # [B, L]
        pooled = hidden.masked_fill(~real[..., None], 0).sum(1) / count
    return functional.normalize(pooled, dim=-1) if pooling.normalise else pooled


def _modules(directory: str) -> tuple[str, bool]:
    """The pooling's folder, and whether vectors are scaled afterwards, of modules.json."""
    modules = _read(directory, "modules.json", list, needed=True)
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        folders = [str(module["path"]) for module in modules if str(module["type"]).endswith(".Pooling")]
    except (KeyError, TypeError):
        raise UserError(f"teacher.model: {directory}/modules.json is no list of modules") from None
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or not folders:
        raise UserError(
            f"teacher.model: {directory}/modules.json is {', '.join(kinds)}; supported are Transformer and"
            " Pooling, with or without Normalize"
        )
    return folders[0], kinds[-1] == "Normalize"


def _mode(pooled: Mapping[str, Any], where: str) -> Mode:
    """UserError where it is another, or several are joined."""
    chosen = pooled.get("pooling_mode")
    if chosen is None:
        on = [name for name, value in pooled.items() if value is True and name.startswith("pooling_mode_")]
        chosen = "+".join(on)
    if chosen not in MODES:
        found = chosen or "nothing"
        raise UserError(f"{where} pools by {found}; supported are mean and cls, the first token")
    return MODES[chosen]


def _read(directory: str, name: str, kind: type, needed: bool = False) -> Any:
    path = os.path.join(directory, name)
    if not needed and not os.path.isfile(path):
        return kind()
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
        if not isinstance(content, kind):
            raise ValueError(f"it is no {kind.__name__}")
    except (OSError, ValueError, RecursionError) as error:
        what = f"{path} cannot be read ({error})"
        raise UserError(f"teacher.model: {what}; is it a sentence encoder?") from None
    return content
