"""Loads the teacher on a worker's device, in the recipe's dtype, split below the layers to be replayed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from infra.cpu.native import has_triton
from infra.settings.sections import Teacher
from offline_teacher.inference import reduction_kernel
from offline_teacher.models.loading import find_teacher, load_model, read_config, weight_digest
from offline_teacher.models.pooling import Pooling, read_pooling
from offline_teacher.models.replay import Replay
from offline_teacher.models.split import Lower, lower_part
from offline_teacher.models.weights import has_masked_lm_head, top_weights


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher ready to run."""

    lower: Lower
    """The layers below the top ``replay_layers`` layers."""
    top: Replay | None
    """The top ``replay_layers`` layers and the head; None if no logits are needed or there is no head."""
    pooling: Pooling | None
    """The pooling of a sentence encoder; None for another teacher."""
    config: Any
    weight_digest: str
    device: torch.device
    dtype: torch.dtype
    environment: dict[str, str | int | float | bool | None]
    """The facts on which the last bits of the outputs depend, see ``environment``."""


def load_teacher(teacher: Teacher, replay_layers: int, with_top: bool, device: str) -> LoadedTeacher:
    """Loads the model that ``teacher.model`` names.

    Raises UserError if the directory has no weights, an unknown family, or too few layers. Switches off
    reductions in reduced precision, so that 16-bit matrix products are accumulated in float32.
    """
    directory = find_teacher(teacher)
    config = read_config(directory)
    model = load_model(directory, config)
    dtype = getattr(torch, teacher.dtype)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    top = None
    if with_top and has_masked_lm_head(model):
        top = Replay(config, top_weights(model, replay_layers), replay_layers, dtype).to(device)
    return LoadedTeacher(
        lower=lower_part(model, replay_layers).to(device=device, dtype=dtype),
        top=top,
        pooling=read_pooling(directory),
        config=config,
        weight_digest=weight_digest(directory),
        device=torch.device(device),
        dtype=dtype,
        environment=environment(teacher, device),
    )


def environment(teacher: Teacher, device: str) -> dict[str, str | int | float | bool | None]:
    """Returns what a task records about its machine and libraries, without host name and time."""
    import transformers

    on_cpu = device == "cpu"
    return {
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability() if on_cpu else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernel": _kernel(on_cpu),
        "logits": str(logit_dtype("cpu" if on_cpu else "cuda", getattr(torch, teacher.dtype))).split(".")[1],
        "dtype": teacher.dtype,
        "batch_size": teacher.batch_size,
        "threads": teacher.cpu_threads if on_cpu else None,
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA") if on_cpu else None,
    }


def logit_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the logits for a teacher of this dtype. CUDA sums 16-bit products in float32 and
    can return the sums without rounding them; a CPU cannot."""
    return torch.float32 if device_type == "cuda" else dtype


def _kernel(on_cpu: bool) -> str:
    """Names the implementation that reduces logits."""
    if on_cpu:
        return "C++" if reduction_kernel.available() else "torch"
    return "Triton" if has_triton() else "torch"
