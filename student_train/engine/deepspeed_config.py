"""Builds DeepSpeed's configuration from a recipe and a user's JSON file, without importing DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Train

NEVER_PRINT = 1 << 62
"""A number of steps that no run reaches, for ``steps_per_print``."""


def build_config(train: Train, world: int) -> dict[str, Any]:
    """Returns DeepSpeed's ``config`` for ``world`` ranks: the recipe's settings over those of the user's
    JSON. Raises UserError if the JSON file (``train.deepspeed_config``) contradicts the recipe."""
    accumulation = math.ceil(train.batch_size / (train.micro_batch_size * world))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed requires this product. The stream makes the real batches, and the last may be smaller.
        "train_batch_size": train.micro_batch_size * accumulation * world,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": train.zero_stage},
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "fp16": {"enabled": train.dtype == "float16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER_PRINT,
    }
    if train.zero_stage > 0 and train.dtype != "float32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if train.dtype == "bfloat16":
        # Without this key, DeepSpeed 0.19.8 at stage 1 adds each micro-batch's running sum, not its gradient.
        config["bf16"]["immediate_grad_update"] = True
    if train.deepspeed_config is not None:
        user = storage.read_json(train.deepspeed_config)
        if not isinstance(user, dict):
            raise UserError(f"{train.deepspeed_config}: a DeepSpeed configuration must be a JSON object")
        _check(user, train, accumulation, train.deepspeed_config)
        config = _merge({k: v for k, v in user.items() if k not in ("optimizer", "scheduler")}, config)
    return config


def _check(user: Mapping[str, Any], train: Train, accumulation: int, path: str) -> None:
    """Raises UserError at the first key of ``user`` whose value is neither "auto" nor the recipe's value.
    ``accumulation``: micro-batches per step and rank. ``path``: of the JSON file, for messages."""
    recipe_values = {
        "train_batch_size": ("train.batch_size", train.batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_accumulation_steps": ("train.batch_size / (train.micro_batch_size * ranks)", accumulation),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
        "zero_optimization.stage": ("train.zero_stage", train.zero_stage),
        "bf16.enabled": ("train.dtype", train.dtype == "bfloat16"),
        "bfloat16.enabled": ("train.dtype", train.dtype == "bfloat16"),
        "fp16.enabled": ("train.dtype", train.dtype == "float16"),
        "optimizer.params.lr": ("train.learning_rate", train.learning_rate),
        "optimizer.params.betas": ("train.betas", list(train.betas)),
        "optimizer.params.eps": ("train.eps", train.eps),
        "optimizer.params.weight_decay": ("train.weight_decay", train.weight_decay),
    }
    for key, (field, expected) in recipe_values.items():
        value = _get(user, key)
        if value is not None and value != "auto" and value != expected:
            raise UserError(
                f"{path}: {key} is {value!r}, but the recipe's {field} requires {expected!r}; "
                "change one of them or leave the DeepSpeed key out"
            )
    kind = _get(user, "optimizer.type")
    if kind is not None and str(kind).lower() != "adamw":
        raise UserError(
            f"{path}: optimizer.type is {kind!r}, but students are trained with AdamW; leave the key out"
        )
    if user.get("scheduler") is not None:
        raise UserError(
            f"{path}: scheduler is set, but the recipe's train.schedule decides; leave the key out"
        )
    for key in ("offload_optimizer.device", "offload_param.device", "cpu_offload", "cpu_offload_params"):
        key = f"zero_optimization.{key}"
        if _get(user, key) not in (None, "none", False):
            raise UserError(
                f"{path}: {key} is not supported, and an encoder does not need it; leave the key out"
            )


def _get(tree: Any, dotted: str) -> Any:
    """Returns the value at a dotted key of nested mappings; None if there is none."""
    for key in dotted.split("."):
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns ``under`` updated with ``over``, recursively in nested dictionaries."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
