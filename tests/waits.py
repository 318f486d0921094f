"""Counts, on a CPU, the operators for which a host would wait if the tensors were on a GPU."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "aten._local_scalar_dense",
    "aten.item",  # the same in inference mode
    "aten.nonzero",
    "aten.is_nonzero",
    "aten.masked_select",
    "aten.equal",
}
"""Operators whose result a host waits for, or whose size it must know."""


class Waits(TorchDispatchMode):
    """Collects what is dispatched of WAITS, and boolean indices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        indices = args[1] if name == "aten.index" else []
        if name in WAITS or any(index is not None and index.dtype == torch.bool for index in indices):
            frames = traceback.extract_stack()
            # Counts on a CPU are looked at there: it costs nothing, and on another device nobody does.
            if not any(frame.name == "visible_positions" for frame in frames):
                self.seen.append(f"{name} at {[(frame.name, frame.lineno) for frame in frames[-5:-1]]}")
        return func(*args, **(kwargs or {}))
