"""Stage 0's optimiser step with 16-bit weights on a CPU: DeepSpeed's, with a third of the memory traffic.

``FP16_UnfusedOptimizer.step`` reads every gradient twice in search of overflow, which the norm after it shows
as well, converts all of them into fresh float32 memory (whose page faults cost more than AdamW), and clips in
one more pass. Here a gradient is converted, clipped, applied and its weight rounded slice by slice, in the
cache. Loss scale, clipping and what happens to a step that is not finite stay DeepSpeed's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SLICE = 1 << 18
"""Numbers converted and applied at once: with weight and moments 4 MB, which stay in a core's cache."""


class MasterStep:
    """Takes the place of ``step`` of a stage-0 optimiser around ``torch.optim.AdamW(fused=True)``."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._buffer = torch.empty(SLICE)

    def __call__(self, closure: None = None) -> bool:
        """Whether the step was skipped because the gradient is not finite."""
        wrapper = self._wrapper
        wrapper._global_grad_norm = self._norm()
        wrapper.overflow = not math.isfinite(wrapper._global_grad_norm)
        if wrapper.overflow:
            return bool(wrapper._skip_invalid_grad_norm())
        wrapper._update_scale(False)
        divisor = wrapper.unscale_and_clip_grads(wrapper._global_grad_norm, apply_scale=False)
        for group, lows in zip(wrapper.optimizer.param_groups, wrapper.fp16_groups, strict=True):
            for low, full in zip(lows, group["params"], strict=True):
                self._apply(low, full, wrapper.optimizer.state[full], group, torch.tensor(float(divisor)))
        return False

    def _norm(self) -> float:
        """2-norm of all gradients: float32 within a slice, float64 over them."""
        gradients = [low.grad for lows in self._wrapper.fp16_groups for low in lows if low.grad is not None]
        parts = [part for gradient in gradients for part in gradient.view(-1).split(SLICE)]
        wide = (self._buffer[: len(part)].copy_(part) for part in parts)
        return float(torch.stack([torch.dot(part, part) for part in wide]).double().sum().sqrt())

    @torch.no_grad()
    def _apply(
        self, low: Tensor, full: Tensor, state: dict[str, Tensor], group: dict[str, Any], divisor: Tensor
    ) -> None:
        """AdamW on one parameter; a parameter without a gradient has a gradient of 0, as in DeepSpeed."""
        state["step"] += 1
        gradient = torch.zeros_like(low) if low.grad is None else low.grad
        tensors = (low.data, gradient, full.data, state["exp_avg"], state["exp_avg_sq"])
        for parts in zip(*(tensor.view(-1).split(SLICE) for tensor in tensors), strict=True):
            weight16, gradient16, weight, mean, square = parts
            converted = self._buffer[: len(weight)].copy_(gradient16)
            torch._fused_adamw_(
                [weight], [converted], [mean], [square], [], [state["step"]],
                lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False, grad_scale=divisor, found_inf=None,
            )  # fmt: skip
            weight16.copy_(weight)
