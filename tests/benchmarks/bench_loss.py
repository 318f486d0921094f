"""The fused triple loss against DistilBERT's own dense formula: time, peak memory, matmul floor.

``python tests/benchmarks/bench_loss.py`` prints the rows; ``run()`` returns them.

Both sides start from the student's head transform output and end with the gradients of it, of the decoder
weight and of its bias. The dense side is given the teacher's logits for nothing; the fused side replays the
teacher's decoder from its hidden states (exact target), so it does one matrix product more.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from student_train.objectives.soft_targets import ExactTarget, TeacherHead
from student_train.objectives.triple_loss import triple_loss

V, D, T = 30_522, 768, 2.0
TIME_POSITIONS, MEMORY_POSITIONS, THREADS, REPEATS = 2_048, 8_192, 2, 5


def run() -> list[dict[str, Any]]:
    times = _in_a_process("time")
    fused, dense, floor = (statistics.median(times[name]) for name in ("fused", "dense", "matmuls"))
    memory = {name: _in_a_process(f"memory:{name}")["peak_bytes"] for name in ("fused", "dense")}
    where = f"D={D}, V={V}, T={T:g}, exact target, {THREADS} CPU threads, torch {torch.__version__}"
    timed = f"{TIME_POSITIONS} positions, {where}, medians of {REPEATS} interleaved"
    held = f"{MEMORY_POSITIONS} positions, {where}, VmHWM over the inputs"
    return [
        _row(
            "loss.time_over_dense",
            fused / dense,
            "ratio",
            "<= 0.5",
            f"{timed}: {fused:.3f} s / {dense:.3f} s",
        ),
        _row(
            "loss.peak_memory_over_dense",
            memory["fused"] / memory["dense"],
            "ratio",
            "<= 0.1",
            f"{held}: {memory['fused'] / 2**20:.0f} MiB / {memory['dense'] / 2**20:.0f} MiB",
        ),
        _row(
            "loss.matmul_floor_share",
            floor / fused,
            "ratio",
            None,
            f"{timed}: its four bf16 matmuls {floor:.3f} s",
        ),
    ]


def _row(name: str, value: float, unit: str, goal: str | None, conditions: str) -> dict[str, Any]:
    holds = None if goal is None else value <= float(goal.removeprefix("<="))
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "goal": goal,
        "holds": holds,
        "conditions": conditions,
    }


def _in_a_process(what: str) -> dict[str, Any]:
    """Each measurement has a process of its own, so that no allocator or compiler state carries over."""
    environment = {"OMP_NUM_THREADS": str(THREADS), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    if what.startswith("memory"):
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed buffers leave the process at once
    done = subprocess.run(
        [sys.executable, __file__, what], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


class _Problem:
    """Random inputs of one micro-batch: 15 % masked, teacher and student logits of a realistic spread."""

    def __init__(self, positions: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.z = torch.randn(positions, D).to(dtype).requires_grad_()
        self.weight = (torch.randn(V, D) * 0.1).to(dtype).requires_grad_()
        self.bias = torch.zeros(V, dtype=dtype, requires_grad=True)
        self.hidden = torch.randn(positions, D).half()
        self.labels = torch.where(torch.rand(positions) < 0.15, torch.randint(V, (positions,)), -100)
        self.masked = int((self.labels >= 0).sum())
        norm = torch.ones(D), torch.zeros(D)
        decoder = torch.randn(V, D) * 0.1, torch.zeros(V)
        head = TeacherHead(
            torch.eye(D), torch.zeros(D), *norm, *decoder, hidden_act="gelu", layer_norm_eps=1e-12
        )
        self.head = head.to("cpu", dtype)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.z, self.weight, self.bias))

    def fused(self) -> None:
        terms = triple_loss(
            self.z, self.weight, self.bias, ExactTarget(self.head, self.hidden), self.labels,
            None, self.z, None,
            temperature=T, alpha_ce=5.0, alpha_mlm=2.0, alpha_cos=0.0,
            tokens=len(self.z), masked=self.masked, kl_tokens=len(self.z),
        )  # fmt: skip
        self.gradients(terms.total)

    def dense(self, teacher_logits: Tensor) -> None:
        """transformers-research-projects, distillation/distiller.py, ``step``, without the cosine."""
        student_logits = functional.linear(self.z, self.weight, self.bias)
        loss_ce = (
            functional.kl_div(
                functional.log_softmax(student_logits / T, dim=-1),
                functional.softmax(teacher_logits / T, dim=-1),
                reduction="batchmean",
            )
            * T**2
        )
        loss_mlm = functional.cross_entropy(student_logits, self.labels, ignore_index=-100)
        self.gradients(5.0 * loss_ce + 2.0 * loss_mlm)

    @torch.no_grad()
    def teacher_logits(self) -> Tensor:
        return ExactTarget(self.head, self.hidden).rows(slice(None))


def _measure_time() -> dict[str, list[float]]:
    torch.set_num_threads(THREADS)
    narrow, wide = _Problem(TIME_POSITIONS, torch.bfloat16), _Problem(TIME_POSITIONS, torch.float32)
    teacher_logits = wide.teacher_logits()
    z, weight = narrow.z.detach(), narrow.weight.detach()
    logits = torch.empty(TIME_POSITIONS, V, dtype=torch.bfloat16)

    def matmuls() -> None:
        torch.mm(z, weight.t(), out=logits)
        torch.mm(z, weight.t(), out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.t(), z)

    sides: dict[str, Callable[[], None]] = {
        "fused": narrow.fused,
        "matmuls": matmuls,
        "dense": lambda: wide.dense(teacher_logits),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):  # the first warms up (and compiles) and is dropped
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _measure_memory(side: str) -> dict[str, int]:
    """Peak resident memory of one step over what is resident before it (inputs and code)."""
    torch.set_num_threads(THREADS)
    problem = _Problem(MEMORY_POSITIONS, torch.bfloat16 if side == "fused" else torch.float32)
    step = problem.fused
    if side == "dense":
        teacher_logits = problem.teacher_logits()

        def step() -> None:
            problem.dense(teacher_logits)

    else:
        _Problem(8, torch.bfloat16).fused()  # compiles; the kernels' shapes do not depend on the positions
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present
    before = _status("VmRSS")
    step()
    return {"peak_bytes": _status("VmHWM") - before}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        for row in run():
            print(row)
    elif sys.argv[1] == "time":
        print(json.dumps(_measure_time()))
    else:
        print(json.dumps(_measure_memory(sys.argv[1].removeprefix("memory:"))))
