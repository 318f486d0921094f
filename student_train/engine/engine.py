"""DeepSpeed behind a small interface: backward, step, and reading and writing the full training state.

Gradients are summed, not averaged, over ranks and micro-batches: the caller has already divided its losses by
counts over the whole optimiser step. DeepSpeed averages over ranks, so ``backward`` multiplies every loss by
the number of ranks.

Faults of DeepSpeed 0.19.8, seen on a CPU and worked around here:
- at stage 0 with float16, ``engine.backward`` omits the loss scale by which ``step`` divides;
- at stage 0 with float16 or bfloat16, the optimiser's step counter starts at 1, which weakens Adam's bias
  correction, so `Engine` resets it to 0;
- DeepSpeed's functions for the full state return None at stage 0, and cannot set moments before the first
  step at stages 1 and 2, so this module addresses DeepSpeed's flat partitions itself, by DeepSpeed's mapping.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.errors import UserError
from infra.settings.sections import Train
from student_train.engine.deepspeed_config import build_config
from student_train.engine.learning_rate import layer_scales
from student_train.engine.master_step import MasterStep
from student_train.engine.world import World, deepspeed_quiet

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """A student and its optimiser, AdamW, under DeepSpeed."""

    def __init__(self, model: nn.Module, train: Train, world: World) -> None:
        """Moves the float32 ``model`` to the device, casts it, and broadcasts rank 0's weights. Raises
        UserError if ``train.deepspeed_config`` or the processor does not fit the recipe."""
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        config = build_config(train, world.size)
        if train.dtype == "float16" and not get_accelerator().is_fp16_supported():
            raise UserError(
                "train.dtype: float16 is not supported on this processor; use bfloat16 or float32"
            )
        self.model, self.world, self.train_section = model, world, train
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, train), lr=0.0, betas=train.betas, eps=train.eps, fused=True
        )
        unrounded = {name: p.detach().clone() for name, p in trained_parameters(model)}
        try:
            with deepspeed_quiet():
                self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        except Exception as problem:  # of many unrelated types
            hardware_failed = isinstance(problem, RuntimeError) and not isinstance(
                problem, NotImplementedError
            )
            if train.deepspeed_config is None or hardware_failed:
                raise
            reason = " ".join(str(problem).split())[:300]
            raise UserError(f"{train.deepspeed_config}: DeepSpeed refuses it: {reason}") from problem
        self._adamw: torch.optim.AdamW = self._deepspeed.basic_optimizer
        self._stage = train.zero_stage
        if self._stage == 0 and world.size == 1:
            # On a single rank, the all-reduce would only flatten all gradients and copy them back.
            self._deepspeed.enable_backward_allreduce = False
        self._master_step: MasterStep | None = None
        if self._stage == 0 and train.dtype != "float32":
            on_cpu = world.device.type == "cpu"
            host_waits = on_cpu or train.dtype == "float16"
            self._master_step = MasterStep(self._deepspeed.optimizer, host_waits, sliced=on_cpu)
            self._deepspeed.optimizer.step = self._master_step
        # DeepSpeed made its master weights from rounded weights; the weights before rounding replace them.
        zeros = {name: torch.zeros_like(p) for name, p in unrounded.items()}
        state = {"weights": unrounded, **dict.fromkeys(MOMENTS, zeros)}
        self.restore(state if world.is_rank_0 else None, optimizer_step=0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of a micro-batch's ``loss``. ``last``: whether it is the step's last."""
        scale = float(self.world.size)
        if self._stage == 0 and self.train_section.dtype == "float16":
            scale *= self.loss_scale
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss * scale, scale_wrt_gas=False)  # gas: gradient accumulation steps

    def step(self, rate: float) -> Tensor:
        """Clips and applies the gradient with learning rate ``rate``. Returns its 2-norm before clipping,
        without the loss scale: a scalar that a GPU may still have to compute. If the norm is not finite, the
        step changes nothing."""
        for group in self._adamw.param_groups:
            group["lr"] = rate * group["rate_scale"]
        if self._stage == 0 and self.train_section.dtype == "float32":
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if math.isfinite(float(norm)):
                self._deepspeed.step()
            return norm
        scale = self.loss_scale  # read before the step, which may change it
        self._deepspeed.step()
        if not self._deepspeed.was_step_applied():
            return torch.tensor(math.inf, device=self.world.device)  # where the norms of other steps are
        if self._master_step is not None:
            return self._master_step.norm / scale
        return torch.as_tensor(self._deepspeed.get_global_grad_norm(), device=self.world.device)

    @property
    def scale_can_fall(self) -> bool:
        """Whether the loss scale is lowered after steps whose gradient is not finite: False for a constant
        scale, for the lowest one, and in other dtypes than float16."""
        scaler = self._scaler()
        if scaler is None or not getattr(scaler, "dynamic_loss_scale", getattr(scaler, "dynamic", False)):
            return False
        lowest = scaler.min_loss_scale if self._stage == 0 else scaler.min_scale
        return bool(scaler.cur_scale > lowest)

    @property
    def loss_scale(self) -> float:
        """Factor of the loss in float16; 1 in other dtypes."""
        scaler = self._scaler()
        return float(scaler.cur_scale) if scaler is not None else 1.0

    # --- full state, at every ZeRO stage --------------------------------------------------------------------

    def gather(self) -> dict[str, dict[str, Tensor]]:
        """Returns kind -> parameter name -> float32 CPU tensor, for kinds "weights", "exp_avg", "exp_avg_sq".
        Only rank 0 gets tensors, but all ranks call it. A GPU copies to pinned memory, with one wait at the
        end."""
        on_gpu = self.world.device.type == "cuda"
        state: dict[str, dict[str, Tensor]] = {"weights": {}, **{moment: {} for moment in MOMENTS}}
        for name, parameter in trained_parameters(self.model):
            for kind in state:
                tensor = self._read_full(parameter, kind)
                if self.world.is_rank_0:
                    state[kind][name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=on_gpu)
                    state[kind][name].copy_(tensor.detach(), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return state

    def restore(self, state: Mapping[str, Mapping[str, Tensor]] | None, optimizer_step: int) -> None:
        """Sets the state that ``gather`` returned; ``state`` is None except on rank 0. All ranks call it."""
        for name, parameter in trained_parameters(self.model):
            for kind in ("weights", *MOMENTS):
                tensor = torch.empty(parameter.shape, dtype=torch.float32, device=self.world.device)
                if state is not None:
                    tensor.copy_(state[kind][name])
                dist.broadcast(tensor, 0)
                self._write_full(parameter, kind, tensor)
        self._set_optimizer_step(optimizer_step)

    def scaler_state(self) -> dict[str, float]:
        """Returns the state of the loss scaler; {} unless the dtype is float16."""
        scaler = self._scaler()
        values = {name: getattr(scaler, name, None) for name in _SCALER_FIELDS}  # None if no scaler
        return {name: value for name, value in values.items() if value is not None}

    def restore_scaler(self, state: Mapping[str, float]) -> None:
        """Sets the state that ``scaler_state`` returned."""
        scaler = self._scaler()
        for name in _SCALER_FIELDS:
            if scaler is not None and name in state and getattr(scaler, name, None) is not None:
                setattr(scaler, name, state[name])

    def optimizer_step(self) -> int:
        """Returns the number of steps that AdamW has applied, without skipped steps."""
        for state in self._adamw.state.values():
            return int(state["step"])
        return 0

    def _set_optimizer_step(self, count: int) -> None:
        for parameter in (p for group in self._adamw.param_groups for p in group["params"]):
            state = self._adamw_state(parameter)
            state["step"] = torch.as_tensor(float(count), device=parameter.device)

    def _adamw_state(self, updated: Tensor) -> dict[str, Tensor]:
        """Returns AdamW's state of a tensor that it updates; created with zeros if no step has created it."""
        state = self._adamw.state[updated]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=updated.device)
            state.update({moment: torch.zeros_like(updated) for moment in MOMENTS})
        return state

    def _read_full(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Returns the float32 weights or moments of a parameter, whole on every rank. All ranks call it."""
        if self._stage == 0:
            master = self._master(parameter)
            return master if kind == "weights" else self._adamw_state(master)[kind]
        result = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        mapping = _mapping(parameter)
        if mapping is not None:
            part = mapping.lp_fragment_address
            result.narrow(0, part.start, part.numel).copy_(self._fragment(mapping, kind))
        dist.all_reduce(result)
        return result.view(parameter.shape)

    def _write_full(self, parameter: nn.Parameter, kind: str, values: Tensor) -> None:
        """Sets the weights or moments of a parameter; the inverse of ``_read_full``."""
        with torch.no_grad():
            if kind == "weights":
                parameter.copy_(values)
            if self._stage == 0:
                master = self._master(parameter)
                (master if kind == "weights" else self._adamw_state(master)[kind]).copy_(values)
            elif (mapping := _mapping(parameter)) is not None:
                part = mapping.lp_fragment_address
                self._fragment(mapping, kind).copy_(values.flatten().narrow(0, part.start, part.numel))

    def _fragment(self, mapping: Any, kind: str) -> Tensor:
        """Returns this rank's part of a parameter in the flat tensor that AdamW updates (stages 1 and 2)."""
        flat = self._adamw.param_groups[mapping.param_group_index]["params"][0]
        part = mapping.hp_fragment_address
        whole = flat if kind == "weights" else self._adamw_state(flat)[kind]
        return whole.narrow(0, part.start, part.numel)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """Returns the float32 tensor that AdamW updates for a parameter (stage 0)."""
        if self.train_section.dtype == "float32":
            return parameter
        if not hasattr(self, "_masters"):
            wrapper = self._deepspeed.optimizer  # DeepSpeed's optimiser, around AdamW
            params16, params32 = chain(*wrapper.fp16_groups), chain(*wrapper.fp32_groups)
            self._masters = {id(p16): p32 for p16, p32 in zip(params16, params32, strict=True)}
        return self._masters[id(parameter)]

    def _scaler(self) -> Any:
        """Returns DeepSpeed's loss scaler; None unless the dtype is float16."""
        if self.train_section.dtype != "float16":
            return None
        wrapper = self._deepspeed.optimizer
        return wrapper.loss_scale_config if self._stage == 0 else wrapper.loss_scaler


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields name and parameter of every parameter that is not frozen."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _mapping(parameter: nn.Parameter) -> Any:
    """Returns where DeepSpeed keeps this rank's part of a parameter; None if the rank has no part of it. The
    part's address is "lp" in the parameter, and "hp" in the flat tensor that AdamW updates."""
    return parameter._hp_mapping  # type: ignore[attr-defined]


def _parameter_groups(model: nn.Module, train: Train) -> list[dict[str, Any]]:
    """Returns AdamW's groups: weight decay for matrices, none for biases and layer norms, as in BERT. Each
    group has the factor of its learning rate, ``rate_scale``: there are two groups if that is always 1."""
    parameters = dict(trained_parameters(model))
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, scale in layer_scales(list(parameters), train.layer_decay).items():
        is_matrix = parameters[name].ndim > 1
        decay = train.weight_decay if is_matrix else 0.0
        new = {"params": [], "weight_decay": decay, "rate_scale": scale}
        groups.setdefault((is_matrix, scale), new)["params"].append(parameters[name])
    return list(groups.values())
