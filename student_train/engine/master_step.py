"""Stage 0's optimiser step with 16-bit weights: DeepSpeed's, in fewer passes over memory and without waits.

``FP16_UnfusedOptimizer.step`` asks the device for the norm of every gradient, reads every gradient twice in
search of overflow, which the norm shows as well, and converts and clips them in passes of their own.
Here a GPU does everything in a dozen operations and its host waits for none of them. A CPU converts, clips
and applies a gradient slice by slice, in its cache: a third of the memory traffic. Loss scale, clipping and
what happens to a step that is not finite stay DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

SLICE = 1 << 18
"""Numbers that a CPU converts and applies at once: with weight and moments 4 MB, a core's cache."""
TINY = 1e-6
"""DeepSpeed adds it to the norm before it clips."""


class MasterStep:
    """Takes the place of ``step`` of a stage-0 optimiser around ``torch.optim.AdamW(fused=True)``.

    ``waits``: the host reads the norm in every step, as a loss scaler must and a CPU may. Otherwise a step
    whose gradient is not finite changes nothing, and only ``norm`` tells.
    """

    def __init__(self, wrapper: Any, waits: bool, sliced: bool) -> None:
        """``sliced``: slice by slice, for a CPU; otherwise all parameters of a group at once."""
        self._wrapper, self._waits, self._sliced = wrapper, waits, sliced
        largest = SLICE if sliced else max(sum(low.numel() for low in lows) for lows in wrapper.fp16_groups)
        self._buffer = torch.empty(largest, device=wrapper.fp16_groups[0][0].device)
        self.norm = torch.zeros((), device=self._buffer.device)
        """2-norm of the last gradient, float32, with the loss scale in it."""

    @torch.no_grad()
    def __call__(self, closure: None = None) -> bool:
        """Whether the step was skipped because the gradient is not finite, as far as the host knows."""
        wrapper = self._wrapper
        self.norm = wrapper._global_grad_norm = self._norm()
        wrapper.overflow = self._waits and not math.isfinite(float(self.norm))
        if wrapper.overflow:
            return bool(wrapper._skip_invalid_grad_norm())
        wrapper._update_scale(False)
        divisor, not_finite = self._divisor(), (~torch.isfinite(self.norm)).float()
        for group, lows in zip(wrapper.optimizer.param_groups, wrapper.fp16_groups, strict=True):
            for weights16, gradients, weights, means, squares, steps in self._pieces(group["params"], lows):
                adamw(
                    weights, self._converted(gradients), means, squares, [], steps,
                    fused=True, grad_scale=divisor, found_inf=not_finite, amsgrad=False, maximize=False,
                    lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                    weight_decay=group["weight_decay"], eps=group["eps"],
                )  # fmt: skip
                torch._foreach_copy_(weights16, weights)
        return False

    def _norm(self) -> Tensor:
        """float32 within a piece, float64 over them."""
        parts = []
        for lows in self._wrapper.fp16_groups:
            gradients = [low.grad for low in lows if low.grad is not None]
            if self._sliced:
                pieces = [[part] for gradient in gradients for part in gradient.view(-1).split(SLICE)]
            else:
                pieces = [gradients] if gradients else []
            parts += [torch.nn.utils.get_total_norm(self._converted(piece)) for piece in pieces]
        return torch.stack(parts).double().norm().float()

    def _divisor(self) -> Tensor:
        """What gradients are divided by: the loss scale, and more where the norm is above the limit."""
        scale, limit = float(self._wrapper.loss_scale_config.cur_scale), float(self._wrapper.clip_grad)
        if not limit:
            return torch.full_like(self.norm, scale)
        return ((self.norm / scale + TINY) / limit).clamp_min(1.0) * scale

    def _converted(self, gradients: list[Tensor]) -> list[Tensor]:
        """The same in float32, in memory that the next call uses again."""
        sizes = [gradient.numel() for gradient in gradients]
        parts = self._buffer[: sum(sizes)].split(sizes)
        wide = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(wide, gradients)
        return wide

    def _pieces(self, weights: list[Tensor], lows: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
        """16-bit weights, gradients, weights, both moments and step counters of what is applied together.

        A parameter without a gradient has a gradient of 0, as in DeepSpeed.
        """
        gradients = [torch.zeros_like(low) if low.grad is None else low.grad for low in lows]
        states = [self._wrapper.optimizer.state[weight] for weight in weights]
        means, squares, steps = (
            [state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        columns = ([low.data for low in lows], gradients, weights, means, squares)
        if not self._sliced:
            yield *columns, steps
            return
        for *tensors, step in zip(*columns, steps, strict=True):
            for parts in zip(*(tensor.view(-1).split(SLICE) for tensor in tensors), strict=True):
                yield *([part] for part in parts), [step.clone()]
            step += 1
