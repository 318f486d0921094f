"""Updates the float32 master weights of a 16-bit model: DeepSpeed's stage-0 step, with less to wait for.

DeepSpeed's ``FP16_UnfusedOptimizer.step`` waits for the norm of every gradient, and converts and clips in
separate passes. It also reads every gradient twice to look for an overflow, although the norm already shows
it. Here a GPU does the step in a dozen operations, and the host does not wait for it. A CPU converts, clips
and applies gradients slice by slice in its cache, with a third of the memory traffic. Loss scaling, clipping
and skipped steps are as in DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

SLICE = 1 << 18
"""Number of elements that a CPU processes at once. In float32 their gradients, weights and two moments take
4 MB, which fits a core's cache."""
NORM_EPSILON = 1e-6
"""Added to the norm before clipping, as in DeepSpeed."""


class MasterStep:
    """Replaces ``step`` of a stage-0 optimiser around ``torch.optim.AdamW(fused=True)``.

    ``host_waits``: the host reads the norm in every step, as a loss scaler needs. A step whose gradient is
    not finite changes nothing; without ``host_waits``, only ``norm`` shows it. ``sliced`` needs
    ``host_waits``, because otherwise AdamW would count such a step.
    """

    def __init__(self, wrapper: Any, host_waits: bool, sliced: bool) -> None:
        """``wrapper``: DeepSpeed's optimiser. ``sliced``: works slice by slice, for a CPU."""
        assert host_waits or not sliced
        self._wrapper, self._host_waits, self._sliced = wrapper, host_waits, sliced
        largest = SLICE if sliced else max(sum(p.numel() for p in group) for group in wrapper.fp16_groups)
        self._buffer = torch.empty(largest, device=wrapper.fp16_groups[0][0].device)
        self.norm = torch.zeros((), device=self._buffer.device)
        """2-norm of the last gradient, float32 scalar, multiplied by the loss scale."""

    @torch.no_grad()
    def __call__(self, closure: None = None) -> bool:
        """Does the step. Returns True if the host saw a gradient that is not finite and skipped the step."""
        wrapper = self._wrapper
        self.norm = wrapper._global_grad_norm = self._norm()
        wrapper.overflow = self._host_waits and not math.isfinite(float(self.norm))
        if wrapper.overflow:
            return bool(wrapper._skip_invalid_grad_norm())
        wrapper._update_scale(False)  # before the division, as in DeepSpeed, which divides by the new scale
        divisor, not_finite = self._divisor(), (~torch.isfinite(self.norm)).float()
        for group, params16 in zip(wrapper.optimizer.param_groups, wrapper.fp16_groups, strict=True):
            slices = self._slices(group["params"], params16)
            for weights16, gradients, weights, means, squares, steps in slices:
                adamw(
                    weights, self._in_float32(gradients), means, squares, [], steps,
                    fused=True, grad_scale=divisor, found_inf=not_finite, amsgrad=False, maximize=False,
                    lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                    weight_decay=group["weight_decay"], eps=group["eps"],
                )  # fmt: skip
                torch._foreach_copy_(weights16, weights)
        return False

    def _norm(self) -> Tensor:
        """Returns the gradient's 2-norm, summed in float32 within a slice and in float64 over slices."""
        norms = []
        for params16 in self._wrapper.fp16_groups:
            gradients = [p.grad for p in params16 if p.grad is not None]
            if self._sliced:
                slices = [[flat] for gradient in gradients for flat in gradient.view(-1).split(SLICE)]
            else:
                slices = [gradients] if gradients else []
            norms += [torch.nn.utils.get_total_norm(self._in_float32(one)) for one in slices]
        return torch.stack(norms).double().norm().float()

    def _divisor(self) -> Tensor:
        """Returns what gradients are divided by: the loss scale; if the unscaled norm exceeds the
        clipping limit, also times unscaled norm / limit."""
        scale, limit = float(self._wrapper.loss_scale_config.cur_scale), float(self._wrapper.clip_grad)
        if not limit:
            return torch.full_like(self.norm, scale)
        return ((self.norm / scale + NORM_EPSILON) / limit).clamp_min(1.0) * scale

    def _in_float32(self, gradients: list[Tensor]) -> list[Tensor]:
        """Returns the gradients in float32, in a buffer that the next call overwrites."""
        sizes = [gradient.numel() for gradient in gradients]
        buffers = self._buffer[: sum(sizes)].split(sizes)
        copies = [flat.view(gradient.shape) for flat, gradient in zip(buffers, gradients, strict=True)]
        torch._foreach_copy_(copies, gradients)
        return copies

    def _slices(self, weights: list[Tensor], params16: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
        """Yields what one call of AdamW updates: 16-bit weights, gradients, float32 weights, moments, steps.
        A parameter without a gradient counts as having gradient 0, as in DeepSpeed."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params16]
        states = [self._wrapper.optimizer.state[weight] for weight in weights]
        names = ("exp_avg", "exp_avg_sq", "step")
        means, squares, steps = ([state[name] for state in states] for name in names)
        columns = ([p.data for p in params16], gradients, weights, means, squares)
        if not self._sliced:
            yield *columns, steps
            return
        for *tensors, step in zip(*columns, steps, strict=True):
            for slices in zip(*(tensor.view(-1).split(SLICE) for tensor in tensors), strict=True):
                yield *([flat] for flat in slices), [step.clone()]
            step += 1
