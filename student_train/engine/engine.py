"""Wraps DeepSpeed in a small interface: backward, step, and saving and restoring the full state.

Gradients are exact sums. The caller divides its losses by counts over the whole optimiser step. DeepSpeed
averages over ranks, so a loss is multiplied by the number of ranks, and never divided by accumulation steps.

Faults of DeepSpeed 0.19.8, seen on CPU and worked around here:
- at stage 0 with float16, ``engine.backward`` omits the loss scale by which ``step`` divides;
- at stage 0 with float16 or bfloat16, the optimiser's step counter starts at 1, which weakens Adam's bias
  correction; it is reset to 0;
- its functions for full state return None at stage 0, and cannot set moments before the first step at stages
  1 and 2; this module uses their mapping to address the flat partitions itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.errors import UserError
from infra.settings.sections import Train
from student_train.engine.deepspeed_config import build_config
from student_train.engine.master_step import MasterStep
from student_train.engine.world import World, deepspeed_quiet

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepResult:
    gradient_norm: Tensor
    """2-norm of the whole gradient before clipping, without the loss scale; the device may still compute it.
    If it is not finite, the step changed nothing."""


class Engine:
    """A student, its optimiser, and DeepSpeed around them."""

    def __init__(self, model: nn.Module, train: Train, world: World) -> None:
        """Moves ``model`` (float32) to the device, casts it, and broadcasts rank 0's weights, in place."""
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        config = build_config(train, world.size)
        if train.dtype == "float16" and not get_accelerator().is_fp16_supported():
            raise UserError(
                "train.dtype: float16 is not supported on this processor; use bfloat16 or float32"
            )
        self.model, self.world, self.train = model, world, train
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, train.weight_decay), lr=0.0, betas=train.betas, eps=train.eps, fused=True
        )
        initial = {name: p.detach().clone() for name, p in trained(model)}
        with deepspeed_quiet():
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self._adamw: torch.optim.AdamW = self._engine.basic_optimizer
        self._stage = train.zero_stage
        if self._stage == 0 and world.size == 1:
            # With one rank, the all-reduce would only flatten all gradients and copy them back.
            self._engine.enable_backward_allreduce = False
        self._master_step: MasterStep | None = None
        if self._stage == 0 and train.dtype != "float32":
            on_cpu = world.device.type == "cpu"
            waits = on_cpu or train.dtype == "float16"
            self._master_step = MasterStep(self._engine.optimizer, waits, sliced=on_cpu)
            self._engine.optimizer.step = self._master_step
        # DeepSpeed copied its master weights from rounded ones; the given weights replace them.
        zeros = {name: torch.zeros_like(p) for name, p in initial.items()}
        state = {"weights": initial, **dict.fromkeys(MOMENTS, zeros)}
        self.restore(state if world.first else None, optimizer_step=0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of ``loss``, a micro-batch's share; ``last``: it ends this rank's step."""
        scale = float(self.world.size)
        if self._stage == 0 and self.train.dtype == "float16":
            scale *= self.loss_scale
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * scale, scale_wrt_gas=False)

    def step(self, rate: float) -> StepResult:
        """Clips and applies the gradient at learning rate ``rate``. Does nothing if it is not finite."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        if self._stage == 0 and self.train.dtype == "float32":
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if math.isfinite(float(norm)):
                self._engine.step()
            return StepResult(norm)
        scale = self.loss_scale if self._stage == 0 else 1.0
        self._engine.step()
        if not self._engine.was_step_applied():
            return StepResult(torch.tensor(math.inf))
        if self._master_step is not None:
            return StepResult(self._master_step.norm / scale)
        return StepResult(torch.as_tensor(self._engine.get_global_grad_norm() / scale))

    @property
    def loss_scale(self) -> float:
        scaler = self._scaler()
        return float(scaler.cur_scale) if scaler is not None else 1.0

    # --- full state, whatever the stage ---------------------------------------------------------------------

    def gather(self) -> dict[str, dict[str, Tensor]]:
        """Float32 state on the CPU, kind -> parameter name -> tensor, on rank 0 only. All ranks call it."""
        state: dict[str, dict[str, Tensor]] = {"weights": {}, **{moment: {} for moment in MOMENTS}}
        for name, parameter in trained(self.model):
            for kind in state:
                full = self._full(parameter, kind)
                if self.world.first:
                    state[kind][name] = full.detach().to("cpu", copy=True).contiguous()
        return state

    def restore(self, state: Mapping[str, Mapping[str, Tensor]] | None, optimizer_step: int) -> None:
        """The inverse of ``gather``: rank 0 passes the state, others pass None. All ranks call it."""
        for name, parameter in trained(self.model):
            for kind in ("weights", *MOMENTS):
                full = torch.empty(parameter.shape, dtype=torch.float32, device=self.world.device)
                if state is not None:
                    full.copy_(state[kind][name])
                dist.broadcast(full, 0)
                self._put(parameter, kind, full)
        self._set_optimizer_step(optimizer_step)

    def scaler_state(self) -> dict[str, float]:
        scaler = self._scaler()
        found = {name: getattr(scaler, name, None) for name in _SCALER_FIELDS}
        return {name: value for name, value in found.items() if value is not None}

    def restore_scaler(self, state: Mapping[str, float]) -> None:
        scaler = self._scaler()
        for name in _SCALER_FIELDS:
            if scaler is not None and name in state and getattr(scaler, name, None) is not None:
                setattr(scaler, name, state[name])

    def optimizer_step(self) -> int:
        """Steps AdamW has applied (skipped ones not counted)."""
        for state in self._adamw.state.values():
            return int(state["step"])
        return 0

    def _set_optimizer_step(self, count: int) -> None:
        for parameter in (p for group in self._adamw.param_groups for p in group["params"]):
            state = self._moments(parameter)
            state["step"] = torch.as_tensor(float(count), device=parameter.device)

    def _moments(self, optimized: Tensor) -> dict[str, Tensor]:
        """AdamW's state for one of its tensors; created with zeros if no step has created it yet."""
        state = self._adamw.state[optimized]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=optimized.device)
            state.update({moment: torch.zeros_like(optimized) for moment in MOMENTS})
        return state

    def _full(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if self._stage == 0:
            master = self._master(parameter)
            return master if kind == "weights" else self._moments(master)[kind]
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        mapping = _mapping(parameter)
        if mapping is not None:
            where = mapping.lp_fragment_address
            whole.narrow(0, where.start, where.numel).copy_(self._fragment(mapping, kind))
        dist.all_reduce(whole)
        return whole.view(parameter.shape)

    def _put(self, parameter: nn.Parameter, kind: str, full: Tensor) -> None:
        with torch.no_grad():
            if kind == "weights":
                parameter.copy_(full)
            if self._stage == 0:
                master = self._master(parameter)
                (master if kind == "weights" else self._moments(master)[kind]).copy_(full)
            elif (mapping := _mapping(parameter)) is not None:
                where = mapping.lp_fragment_address
                self._fragment(mapping, kind).copy_(full.flatten().narrow(0, where.start, where.numel))

    def _fragment(self, mapping: Any, kind: str) -> Tensor:
        """This rank's part of a parameter in the flat tensor that AdamW updates (stages 1 and 2)."""
        flat = self._adamw.param_groups[mapping.param_group_index]["params"][0]
        where = mapping.hp_fragment_address
        return (flat if kind == "weights" else self._moments(flat)[kind]).narrow(0, where.start, where.numel)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 tensor that AdamW updates (stage 0)."""
        if self.train.dtype == "float32":
            return parameter
        if not hasattr(self, "_masters"):
            wrapper = self._engine.optimizer
            pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            self._masters = {
                id(low): full for lows, fulls in pairs for low, full in zip(lows, fulls, strict=True)
            }
        return self._masters[id(parameter)]

    def _scaler(self) -> Any:
        if self.train.dtype != "float16":
            return None
        wrapper = self._engine.optimizer
        return wrapper.loss_scale_config if self._stage == 0 else wrapper.loss_scaler


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that get a gradient; the others are frozen."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _mapping(parameter: nn.Parameter) -> Any:
    """Where DeepSpeed keeps this rank's part of a parameter; None if other ranks hold all of it."""
    return parameter._hp_mapping  # type: ignore[attr-defined]


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay applies to matrices only, not to biases and layer norms, as in BERT."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
