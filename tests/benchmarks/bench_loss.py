"""Time and peak memory of the chunked losses relative to the dense formulas, and the share of matrix
products.

``python tests/benchmarks/bench_loss.py`` prints the rows; ``run()`` returns them. Both sides use the fastest
dtype of the processor and equal inputs, and compute all gradients.

Triple loss: the input is the output of the student's head transform. The gradients are those of this input,
of the decoder weight and of the decoder bias. The dense side is DistilBERT's formula. It receives the
teacher's logits without cost, while our side computes them from hidden states (exact target), so our side has
one more matrix product.

Relation loss: the inputs are queries, keys and values of a 6 x 384 student and of BERT-base, and the
gradients are those of the student's. The dense side is MiniLMv2's formula.
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

from infra.cpu.processor import computes_bfloat16
from student_train.objectives.relations import RELATIONS, relation_loss
from student_train.objectives.soft_targets import ExactTarget
from student_train.objectives.triple_loss import triple_loss
from tests.benchmarks.live_reference import dense_relation_loss
from tests.benchmarks.results import Row, row
from tests.student_train.heads import Head

V, D, T = 30_522, 768, 2.0
BATCH, L, STUDENT, HEADS = 64, 128, 384, 48
POSITIONS = {"time": 2_048, "memory": 8_192}
THREADS, REPEATS = 2, 5


def best_dtype() -> torch.dtype:
    return torch.bfloat16 if computes_bfloat16() else torch.float32


def run() -> list[Row]:
    dtype = str(best_dtype()).removeprefix("torch.")
    where = f"{dtype} on both sides, {THREADS} CPU threads, torch {torch.__version__}"
    triple = f"D={D}, V={V}, T={T:g}, exact target, {where}"
    relations = f"batch {BATCH}, L={L}, {HEADS} relation heads, D={D} and {STUDENT}, {where}"
    seconds, rows = _seconds("triple"), []
    rows += _compared("loss", triple, seconds, _peak("triple"), ("<= 0.5", "<= 0.1"))
    floor = seconds["products"] / seconds["ours"]
    conditions = (
        f"{POSITIONS['time']} positions, {triple}: its four matrix products {seconds['products']:.3f} s"
    )
    rows.append(row("loss.matmul_floor_share", floor, "ratio", None, conditions))
    measured = _seconds("relation"), _peak("relation")
    return rows + _compared("loss.relation", relations, *measured, ("<= 1", "<= 0.2"))


def _compared(
    name: str, where: str, seconds: dict[str, float], peak: dict[str, int], goals: tuple[str, str]
) -> list[Row]:
    joint = "." if name == "loss" else "_"
    positions = {kind: f"{count} positions, " if name == "loss" else "" for kind, count in POSITIONS.items()}
    mib = {side: held / 2**20 for side, held in peak.items()}
    return [
        row(
            f"{name}{joint}time_over_dense", seconds["ours"] / seconds["dense"], "ratio", goals[0],
            f"{positions['time']}{where}, medians of {REPEATS} interleaved:"
            f" {seconds['ours']:.3f} s / {seconds['dense']:.3f} s",
        ),
        row(
            f"{name}{joint}peak_memory_over_dense", peak["ours"] / peak["dense"], "ratio", goals[1],
            f"{positions['memory']}{where}, VmHWM over the inputs:"
            f" {mib['ours']:.0f} MiB / {mib['dense']:.0f} MiB",
        ),
    ]  # fmt: skip


def _seconds(what: str) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in _in_a_process("time", what).items()}


def _peak(what: str) -> dict[str, int]:
    return {side: _in_a_process("memory", what, side)["peak_bytes"] for side in ("ours", "dense")}


def _in_a_process(*words: str) -> dict[str, Any]:
    """Runs one measurement in a separate process, so that no allocator or compiler state carries over."""
    environment = {"OMP_NUM_THREADS": str(THREADS), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    if words[0] == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed buffers are returned to the system at once
    done = subprocess.run(
        [sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


class TripleProblem:
    """Random inputs of the triple loss: 15 % masked, with a realistic spread of the logits."""

    def __init__(self, positions: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.z = torch.randn(positions, D).to(dtype).requires_grad_()
        self.weight = (torch.randn(V, D) * 0.1).to(dtype).requires_grad_()
        self.bias = torch.zeros(V, dtype=dtype, requires_grad=True)
        self.hidden = torch.randn(positions, D).half()
        self.labels = torch.where(torch.rand(positions) < 0.15, torch.randint(V, (positions,)), -100)
        self.masked = int((self.labels >= 0).sum())
        norm, decoder = (torch.ones(D), torch.zeros(D)), (torch.randn(V, D) * 0.1, torch.zeros(V))
        self.head = Head(torch.eye(D), torch.zeros(D), *norm, *decoder).to(dtype)
        self.teacher_logits: Tensor | None = None

    def ours(self) -> None:
        terms = triple_loss(
            self.z, self.weight, self.bias, ExactTarget(self.head, self.hidden), self.labels, self.z, None,
            temperature=T, alpha_ce=5.0, alpha_mlm=2.0, alpha_cos=0.0,
            tokens=len(self.z), masked=self.masked, kl_tokens=len(self.z),
        )  # fmt: skip
        torch.autograd.grad(terms.total, (self.z, self.weight, self.bias))

    def prepare(self) -> None:
        """Computes the teacher's logits, an input of the dense side."""
        with torch.no_grad():
            self.teacher_logits = ExactTarget(self.head, self.hidden).logits(slice(None))

    def dense(self) -> None:
        """Computes ``step`` of transformers-research-projects' distillation/distiller.py without the
        cosine."""
        assert self.teacher_logits is not None
        with torch.autocast("cpu", self.z.dtype, enabled=self.z.dtype == torch.bfloat16):
            student_logits = functional.linear(self.z, self.weight, self.bias)
            log_q = functional.log_softmax(student_logits / T, dim=-1)
            p = functional.softmax(self.teacher_logits / T, dim=-1)
            loss_ce = functional.kl_div(log_q, p, reduction="batchmean") * T**2
            loss_mlm = functional.cross_entropy(student_logits, self.labels, ignore_index=-100)
        torch.autograd.grad(5.0 * loss_ce + 2.0 * loss_mlm, (self.z, self.weight, self.bias))

    def products(self) -> None:
        z, weight = self.z.detach(), self.weight.detach()
        logits = torch.mm(z, weight.t())
        torch.mm(z, weight.t(), out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.t(), z)


class RelationProblem:
    """Queries, keys and values of teacher and student; seven of eight sequences have full length."""

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.student = {name: torch.randn(batch, L, STUDENT).to(dtype).requires_grad_() for name in RELATIONS}
        self.teacher = {name: torch.randn(batch, L, D).to(dtype) for name in RELATIONS}
        self.count = torch.where(torch.arange(batch) % 8 == 0, L * 3 // 4, L)

    def ours(self) -> None:
        tokens = float(self.count.sum())
        loss = relation_loss(self.student, self.teacher, self.count, HEADS, tokens)
        torch.autograd.grad(loss, list(self.student.values()))

    def prepare(self) -> None: ...

    def dense(self) -> None:
        student, teacher = list(self.student.values()), list(self.teacher.values())
        with torch.autocast("cpu", student[0].dtype, enabled=student[0].dtype == torch.bfloat16):
            loss = dense_relation_loss(student, teacher, self.count, HEADS)
        torch.autograd.grad(loss, student)

    def products(self) -> None:
        for name in RELATIONS:
            for x in (self.student[name].detach(), self.teacher[name]):
                grouped = x.view(len(x), L, HEADS, -1).transpose(1, 2)
                grouped @ grouped.transpose(2, 3)


def _problem(what: str, kind: str) -> TripleProblem | RelationProblem:
    dtype = best_dtype()
    return TripleProblem(POSITIONS[kind], dtype) if what == "triple" else RelationProblem(BATCH, dtype)


def _measure_time(what: str) -> dict[str, list[float]]:
    torch.set_num_threads(THREADS)
    problem = _problem(what, "time")
    problem.prepare()
    sides: dict[str, Callable[[], None]] = {
        "ours": problem.ours, "products": problem.products, "dense": problem.dense,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):  # the first repeat warms up and compiles; it is not counted
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _measure_memory(what: str, side: str) -> dict[str, int]:
    """Returns the peak resident memory of one step, less the memory before the step (inputs and code)."""
    torch.set_num_threads(THREADS)
    problem = _problem(what, "memory")
    if side == "dense":
        problem.prepare()
    elif what == "triple":
        TripleProblem(8, best_dtype()).ours()  # compiles; the kernels' shapes do not depend on the positions
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current resident memory
    before = _status("VmRSS")
    getattr(problem, side)()
    return {"peak_bytes": _status("VmHWM") - before}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        for measured in run():
            print(json.dumps(measured))
    else:
        measure: dict[str, Callable[..., Any]] = {"time": _measure_time, "memory": _measure_memory}
        print(json.dumps(measure[sys.argv[1]](*sys.argv[2:])))
