"""The teacher as a worker holds it: cut below its top, on its device, in the recipe's dtype."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from infra.cpu.native import triton_there
from infra.settings.sections import Teacher
from offline_teacher.families.loading import load_model
from offline_teacher.families.pooling import Pooling
from offline_teacher.families.replay import Replay
from offline_teacher.families.split import Lower, lower
from offline_teacher.families.weights import has_masked_lm_head, top_weights
from offline_teacher.inference import reduction_kernel
from offline_teacher.teacher_directory import find_teacher, load_config, read_pooling_of, weight_digest


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher ready to run."""

    lower: Lower
    """Gives the hidden states that enter its top ``replay_layers`` layers."""
    top: Replay | None
    """Its top layers and head; None where nothing asks for them."""
    pooling: Pooling | None
    config: Any
    weight_digest: str
    device: torch.device
    dtype: torch.dtype
    environment: dict[str, str | int | float | bool | None]
    """What decides the last bits of its numbers."""


def load_teacher(teacher: Teacher, replay_layers: int, with_top: bool, device: str) -> LoadedTeacher:
    """Loads the model that ``teacher.model`` names.

    Raises UserError where the directory has no weights, another family, or fewer layers. Float32 products are
    accumulated in float32: reductions in less precision are switched off.
    """
    directory = find_teacher(teacher)
    config = load_config(directory)
    model = load_model(directory, config)
    dtype = getattr(torch, teacher.dtype)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    top = None
    if with_top and has_masked_lm_head(model):
        top = Replay(config, top_weights(model, replay_layers), replay_layers, dtype).to(device)
    return LoadedTeacher(
        lower=lower(model, replay_layers).to(device=device, dtype=dtype),
        top=top,
        pooling=read_pooling_of(directory),
        config=config,
        weight_digest=weight_digest(directory),
        device=torch.device(device),
        dtype=dtype,
        environment=environment(teacher, device),
    )


def environment(teacher: Teacher, device: str) -> dict[str, str | int | float | bool | None]:
    """What a task records of the machine and the libraries that computed its numbers; no host, no time."""
    import transformers

    on_cpu = device == "cpu"
    return {
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability() if on_cpu else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernel": _kernel(on_cpu),
        "dtype": teacher.dtype,
        "batch_size": teacher.batch_size,
        "threads": teacher.cpu_threads if on_cpu else None,
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA") if on_cpu else None,
    }


def _kernel(on_cpu: bool) -> str:
    """What reduces logits."""
    if on_cpu:
        return "C++" if reduction_kernel.available() else "torch"
    return "Triton" if triton_there() else "torch"
