"""Measures the peak memory of a forward pass by counting the tensors that it makes.

Unlike a process's memory, the result does not depend on what else the process holds. Scratch space inside
one operation is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaluation.devices.latency import Inputs
from evaluation.finetuning.model_inputs import inputs_of


@torch.inference_mode()
def peak_memory(model: torch.nn.Module, inputs: Inputs) -> int:
    """Returns the bytes of the weights plus the largest sum of bytes of the forward's tensors at one time."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs_of(model)(inputs).items()}
    weights = [*model.parameters(), *model.buffers()]
    with _LiveTensors([*tensors.values(), *weights]) as live:
        model(**tensors)
    return live.peak + sum(tensor.numel() * tensor.element_size() for tensor in weights)


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that exist, except those in ``known``; views of one storage count once.

    ``peak``: the largest count so far.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._references: Counter[int] = Counter()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._known:
            return
        if not self._references[address]:
            self._live += size
            self.peak = max(self.peak, self._live)
        self._references[address] += 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._references[address] -= 1
        if not self._references[address]:
            self._live -= size
