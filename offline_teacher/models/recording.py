"""Queries, keys and values of a layer: recorded during a model's own forward, or computed alone.

In families with rotary positions they are taken before the rotation, in teacher and student alike; see
`replay`. Axes: B batch, L length, D hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offline_teacher.families import family_of


class QueriesKeysValues:
    """Keeps the outputs of a layer's projections in the last forward of ``model``, with their autograd graph.

    Make it before ``torch.compile``, which does not see hooks that come later. ``close``, or leaving a
    ``with`` block, takes the hooks off again. ``layer``: counted from 0, or from the end with -1.
    """

    def __init__(self, model: Any, layer: int = -1) -> None:
        family = family_of(model.config)
        block = model.base_model.get_submodule(family.layers)[layer]
        self._outputs: dict[int, Tensor] = {}
        self._expected = len(family.projections)
        self._hooks = [
            block.get_submodule(path).register_forward_hook(self._keep(number))
            for number, path in enumerate(family.projections)
        ]

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V, each [B, L, D], heads side by side; they are handed out once."""
        assert len(self._outputs) == self._expected, "no forward pass since the last call"
        outputs = [self._outputs.pop(number) for number in range(self._expected)]
        return separate(outputs)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> QueriesKeysValues:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._outputs[number] = output

        return hook


def projected(encoder: Any, layer: int, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V of a layer, each [B, L, D], from the states [B, L, D] that enter it.

    Runs only the layer's projections, and its norm if one comes before them.
    """
    family = family_of(encoder.config)
    block = encoder.get_submodule(family.layers)[layer]
    if family.attention_norm is not None:
        states = block.get_submodule(family.attention_norm)(states)
    return separate([block.get_submodule(path)(states) for path in family.projections])


def separate(outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V [..., D] of three projections' outputs, or of one [..., 3 D] that holds them in this order."""
    q, k, v = outputs if len(outputs) == 3 else outputs[0].chunk(3, dim=-1)
    return q, k, v
