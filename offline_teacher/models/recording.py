"""Queries, keys and values of a layer: recorded during a forward pass of the model, or computed separately.

In families with rotary positions they are recorded before the rotation, for teacher and student alike; see
`replay`. Axes: B batch, L length, D hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offline_teacher.families import family_of


class QueriesKeysValues:
    """Records the outputs of a layer's projections in a forward of ``model``, with their autograd graph.

    Create it before ``torch.compile``, which ignores hooks that are added later. ``close``, or the end of a
    ``with`` block, removes the hooks. ``layer`` counts from 0, or from the last layer with -1, -2, ...
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
        """Returns Q, K and V, each [B, L, D] with heads side by side, and forgets them."""
        assert len(self._outputs) == self._expected, "no forward pass since the last call"
        return separate([self._outputs.pop(number) for number in range(self._expected)])

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
    """Returns Q, K and V [B, L, D] of a layer for its input ``states`` [B, L, D]; runs nothing else of it."""
    family = family_of(encoder.config)
    block = encoder.get_submodule(family.layers)[layer]
    if family.attention_norm is not None:
        states = block.get_submodule(family.attention_norm)(states)
    return separate([block.get_submodule(path)(states) for path in family.projections])


def separate(outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns Q, K and V [..., D] from the outputs of three projections, or of one projection [..., 3 D]."""
    q, k, v = outputs if len(outputs) == 3 else outputs[0].chunk(3, dim=-1)
    return q, k, v
