"""Stage 0's 16-bit step against torch's AdamW on the converted, clipped gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from student_train.engine.master_step import SLICE, MasterStep

SHAPES = [(3, SLICE // 2 + 5), (7,), (11, 5)]


class Wrapper:
    """What the step uses of DeepSpeed's ``FP16_UnfusedOptimizer``."""

    def __init__(self, dtype: torch.dtype, divisor: float) -> None:
        generator = torch.Generator().manual_seed(0)
        masters = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.fp16_groups = [[masters[0].to(dtype)], [master.to(dtype) for master in masters[1:]]]
        groups = [{"params": masters[:1], "weight_decay": 0.1}, {"params": masters[1:], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, fused=True)
        for master in masters:
            zeros = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            self.optimizer.state[master] = {"step": torch.zeros(()), **zeros}
        self.divisor, self.skipped, self.scaled = divisor, 0, 0

    def unscale_and_clip_grads(self, norm: float, apply_scale: bool) -> float:
        assert not apply_scale
        return self.divisor

    def _skip_invalid_grad_norm(self) -> bool:
        self.skipped += 1
        return True

    def _update_scale(self, skip: bool) -> None:
        self.scaled += 1

    @property
    def lows(self) -> list[Any]:
        return [low for group in self.fp16_groups for low in group]

    @property
    def masters(self) -> list[Any]:
        return [full for group in self.optimizer.param_groups for full in group["params"]]


def gradients(dtype: torch.dtype, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divisor", [1.0, 37.0])
def test_step_is_adamw_on_the_converted_gradient(dtype: torch.dtype, divisor: float) -> None:
    wrapper, oracle = Wrapper(dtype, divisor), Wrapper(dtype, divisor)
    step = MasterStep(wrapper)
    for number in range(3):
        given = gradients(dtype, number)
        for low, full, gradient in zip(wrapper.lows, oracle.masters, given, strict=True):
            low.grad, full.grad = gradient, gradient.float() / divisor
        assert not step()
        oracle.optimizer.step()
        norm = torch.cat([gradient.double().flatten() for gradient in given]).norm()
        assert wrapper._global_grad_norm == pytest.approx(float(norm), rel=1e-5)
    for low, full, expected in zip(wrapper.lows, wrapper.masters, oracle.masters, strict=True):
        torch.testing.assert_close(full, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(low, full.to(dtype))
        assert wrapper.optimizer.state[full]["step"] == 3
    assert wrapper.scaled == 3


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    wrapper, before = Wrapper(torch.bfloat16, 1.0), Wrapper(torch.bfloat16, 1.0)
    for low, gradient in zip(wrapper.lows, gradients(torch.bfloat16, 0), strict=True):
        low.grad = gradient
    wrapper.lows[2].grad[3, 2] = value
    assert MasterStep(wrapper)()
    assert (wrapper.skipped, wrapper.scaled) == (1, 0)
    for full, expected in zip(wrapper.masters, before.masters, strict=True):
        assert torch.equal(full, expected)


def test_no_gradient_is_a_gradient_of_zero() -> None:
    wrapper = Wrapper(torch.bfloat16, 1.0)
    for low, gradient in zip(wrapper.lows[:2], gradients(torch.bfloat16, 0)[:2], strict=True):
        low.grad = gradient
    expected = wrapper.masters[2].clone()
    assert not MasterStep(wrapper)()
    assert torch.equal(wrapper.masters[2], expected)
    assert wrapper.optimizer.state[wrapper.masters[2]]["step"] == 1
