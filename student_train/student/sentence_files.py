"""Writes the files that make a model directory loadable by sentence-transformers, without that library."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from offline_teacher.models.pooling import Pooling

if TYPE_CHECKING:
    from torch import nn


def write_sentence_files(
    directory: str, pooling: Pooling, projection: nn.Linear | None, width: int, length: int
) -> None:
    """Adds modules.json, the folders that it names, and configuration files to a model directory. ``width``:
    the encoder's hidden size. ``length``: number of tokens at which a text is truncated."""
    from safetensors.torch import save_file

    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(directory, "1_Pooling", "config.json", {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": pooling.mode == "cls",
        "pooling_mode_mean_tokens": pooling.mode == "mean",
        "include_prompt": True,
    })  # fmt: skip
    if projection is not None:
        modules.append(("2_Dense", "Dense"))
        _write(directory, "2_Dense", "config.json", {
            "in_features": projection.in_features,
            "out_features": projection.out_features,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        })  # fmt: skip
        weight = projection.weight.detach().float().cpu().contiguous()
        save_file({"linear.weight": weight}, os.path.join(directory, "2_Dense", "model.safetensors"))
    if pooling.normalise:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    _write(directory, "", "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ])  # fmt: skip
    _write(directory, "", "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    prompts = {"prompts": dict(pooling.prompts), "default_prompt_name": pooling.default_prompt}
    _write(directory, "", "config_sentence_transformers.json", prompts)


def _write(directory: str, folder: str, name: str, content: Any) -> None:
    """Writes ``content`` as JSON to ``directory/folder/name``."""
    os.makedirs(os.path.join(directory, folder), exist_ok=True)
    with open(os.path.join(directory, folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
