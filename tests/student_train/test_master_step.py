"""Stage 0's 16-bit step against torch's AdamW on the converted, clipped gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from student_train.engine.master_step import SLICE, MasterStep

SHAPES = [(3, SLICE // 2 + 5), (7,), (11, 5)]


class Wrapper:
    """The part of DeepSpeed's ``FP16_UnfusedOptimizer`` that the step uses."""

    def __init__(self, dtype: torch.dtype, scale: float = 1.0, limit: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        masters = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.fp16_groups = [[masters[0].to(dtype)], [master.to(dtype) for master in masters[1:]]]
        groups = [{"params": masters[:1], "weight_decay": 0.1}, {"params": masters[1:], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, fused=True)
        for master in masters:
            zeros = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            self.optimizer.state[master] = {"step": torch.zeros(()), **zeros}
        self.loss_scale_config, self.clip_grad = SimpleNamespace(cur_scale=scale), limit
        self.skipped = self.scaled = 0

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


SLICED = pytest.mark.parametrize("sliced", [True, False], ids=["sliced", "whole"])


@SLICED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "limit"), [(1.0, 0.0), (64.0, 0.0), (64.0, 2.0), (64.0, 1e9)])
def test_step_is_adamw_on_the_converted_gradient(
    dtype: torch.dtype, scale: float, limit: float, sliced: bool
) -> None:
    wrapper, oracle = Wrapper(dtype, scale, limit), Wrapper(dtype)
    step = MasterStep(wrapper, host_waits=sliced, sliced=sliced)
    for number in range(3):
        given = gradients(dtype, number)
        norm = float(torch.cat([gradient.double().flatten() for gradient in given]).norm())
        clip = max((norm / scale + 1e-6) / limit, 1.0) if limit else 1.0
        for low, full, gradient in zip(wrapper.lows, oracle.masters, given, strict=True):
            low.grad, full.grad = gradient, gradient.float() / (scale * clip)
        assert not step()
        oracle.optimizer.step()
        assert float(step.norm) == pytest.approx(norm, rel=1e-5 if sliced else 1e-4)
    for low, full, expected in zip(wrapper.lows, wrapper.masters, oracle.masters, strict=True):
        torch.testing.assert_close(full, expected, rtol=2e-6, atol=1e-7)
        assert torch.equal(low, full.to(dtype))
        assert wrapper.optimizer.state[full]["step"] == 3
    assert wrapper.scaled == 3


@pytest.mark.parametrize(("waits", "sliced"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, waits: bool, sliced: bool) -> None:
    wrapper, before = Wrapper(torch.bfloat16, limit=1.0), Wrapper(torch.bfloat16)
    for low, gradient in zip(wrapper.lows, gradients(torch.bfloat16, 0), strict=True):
        low.grad = gradient
    wrapper.lows[2].grad[3, 2] = value
    step = MasterStep(wrapper, host_waits=waits, sliced=sliced)
    assert step() == waits  # DeepSpeed's own way with it is for a host that waits
    assert wrapper.skipped == waits
    assert not torch.isfinite(step.norm)
    for low, full, expected in zip(wrapper.lows, wrapper.masters, before.masters, strict=True):
        assert torch.equal(full, expected)
        assert torch.equal(low, expected.bfloat16())
        assert wrapper.optimizer.state[full]["step"] == 0


@SLICED
def test_no_gradient_is_a_gradient_of_zero(sliced: bool) -> None:
    wrapper = Wrapper(torch.bfloat16)
    for low, gradient in zip(wrapper.lows[:2], gradients(torch.bfloat16, 0)[:2], strict=True):
        low.grad = gradient
    expected = wrapper.masters[2].clone()
    assert not MasterStep(wrapper, host_waits=True, sliced=sliced)()
    assert torch.equal(wrapper.masters[2], expected)
    assert wrapper.optimizer.state[wrapper.masters[2]]["step"] == 1


class Dispatched(TorchDispatchMode):
    """Counts torch operations, and those whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not func.is_view
        self.waits += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_a_step_for_a_gpu_is_a_few_operations_and_no_wait() -> None:
    wrapper = Wrapper(torch.bfloat16, limit=1.0)
    for low, gradient in zip(wrapper.lows, gradients(torch.bfloat16, 0), strict=True):
        low.grad = gradient
    step = MasterStep(wrapper, host_waits=False, sliced=False)
    with Dispatched() as dispatched:
        step()
    assert dispatched.waits == 0
    assert 10 < dispatched.operations <= 60, dispatched.operations
    with Dispatched() as dispatched:
        MasterStep(wrapper, host_waits=True, sliced=False)()
    assert dispatched.waits > 0
