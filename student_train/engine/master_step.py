"""DeepSpeed's stage-0 optimiser step for 16-bit weights, with fewer memory passes and without waiting.

``FP16_UnfusedOptimizer.step`` waits for the norm of every gradient, reads every gradient twice to find an
overflow that the norm shows too, and converts and clips in separate passes. Here a GPU does all of it in a
dozen operations, and the host waits for none. A CPU converts, clips and applies a gradient slice by slice in
its cache, with a third of the memory traffic. Loss scaling, clipping and skipped steps work as in DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

SLICE = 1 << 18
"""Numbers that a CPU processes at once; with weight and moments 4 MB, which fits a core's cache."""
TINY = 1e-6
"""Added to the norm before clipping, as in DeepSpeed."""


class MasterStep:
    """Replaces ``step`` of a stage-0 optimiser around ``torch.optim.AdamW(fused=True)``.

    ``waits``: the host reads the norm in every step. A loss scaler needs this; a CPU has nothing to wait for.
    Otherwise a step with a gradient that is not finite changes nothing, and only ``norm`` shows it.
    """

    def __init__(self, wrapper: Any, waits: bool, sliced: bool) -> None:
        """``sliced``: works slice by slice, for a CPU; otherwise on all parameters of a group at once."""
        self._wrapper, self._waits, self._sliced = wrapper, waits, sliced
        largest = SLICE if sliced else max(sum(low.numel() for low in lows) for lows in wrapper.fp16_groups)
        self._buffer = torch.empty(largest, device=wrapper.fp16_groups[0][0].device)
        self.norm = torch.zeros((), device=self._buffer.device)
        """2-norm of the last gradient, float32, still multiplied by the loss scale."""

    @torch.no_grad()
    def __call__(self, closure: None = None) -> bool:
        """Does the step. Returns whether the host saw a gradient that is not finite and skipped the step."""
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
        """The gradient's 2-norm, accumulated in float32 within a piece and in float64 over pieces."""
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
        """Divisor of gradients: the loss scale, times norm / limit if the norm exceeds the limit."""
        scale, limit = float(self._wrapper.loss_scale_config.cur_scale), float(self._wrapper.clip_grad)
        if not limit:
            return torch.full_like(self.norm, scale)
        return ((self.norm / scale + TINY) / limit).clamp_min(1.0) * scale

    def _converted(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients in float32, in a buffer that the next call overwrites."""
        sizes = [gradient.numel() for gradient in gradients]
        parts = self._buffer[: sum(sizes)].split(sizes)
        wide = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(wide, gradients)
        return wide

    def _pieces(self, weights: list[Tensor], lows: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
        """Yields 16-bit weights, gradients, weights, moments and step counters to update together.

        A parameter without a gradient counts as having gradient 0, as in DeepSpeed.
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
