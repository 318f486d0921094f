"""Metrics of the GPU and of a step, the profiler's trace, and the switch to deterministic algorithms."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import UserError
from student_train.engine.determinism import deterministic
from student_train.engine.world import World
from student_train.profiling import SKIPPED_STEPS, gpu_metrics, peak_flops
from student_train.student_and_loss import model_and_objective
from student_train.trainer import Trainer
from tests.student_train.tiny_run import D, L, V, command, logged, student

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 156e12),
        ("Tesla T4", "float16", 65e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("A card of next year", "bfloat16", None),
    ],
)
def test_peak_flops_of_devices(name: str, dtype: str, expected: float | None) -> None:
    assert peak_flops(name, dtype) == expected


def test_metrics_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {
        "max_memory_allocated": 3 << 30, "utilization": 40, "get_device_name": "NVIDIA H100 80GB HBM3",
    }  # fmt: skip
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    begun_anew: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", begun_anew.append)
    metrics = gpu_metrics(GPU, 454.1e6 * 0.9e6, "bfloat16")
    assert begun_anew == [GPU], "the next peak is of the steps that follow"
    assert metrics == {
        "gpu_memory": 3.0,
        "gpu_utilisation": 0.4,
        "model_flops_utilisation": pytest.approx(454.1e6 * 0.9e6 / 989e12),
    }

    def missing(device: torch.device) -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "unknown")
    assert gpu_metrics(GPU, 1.0, "bfloat16") == {"gpu_memory": 3.0}
    assert gpu_metrics(torch.device("cpu"), 1.0, "bfloat16") == {}


@pytest.mark.parametrize("dropout", [0.0, 0.1])  # attention by torch's kernel, and by ours
def test_the_flop_of_a_step(alone: World, run_dir: Path, dropout: float) -> None:
    """FLOP of the triple loss of a one-layer student: products of encoder, both heads and both decoders."""
    from infra.settings.recipe_file import load_recipe
    from offline_teacher.store.store import open_store

    recipe = load_recipe(str(run_dir / "recipe.yaml"), [f"student.dropout={dropout}"])
    model, _ = model_and_objective(recipe.run("student"), open_store(recipe.store_path), alone)
    layer, transform, decoder = 4 * D * D + 2 * D * 32, D * D, V * D
    # Three products of each matrix, forward and backward; the teacher's head and decoder are applied once.
    expected = 6 * (layer + transform + decoder) + 2 * (transform + decoder)
    expected += 3 * 2 * 2 * L * D  # scores and their sums of values, forward and twice backward
    bias = 2 * 8 * V  # its gradient is one of eight more rows of the decoder's
    recomputed = 2 * L * D  # torch's kernel multiplies queries and keys once more backward
    assert expected + bias <= model.flops_per_token <= expected + bias + recomputed


def test_a_trace_of_some_steps(alone: World, run_dir: Path) -> None:
    command(run_dir, "train.profile_steps=2")
    events = json.loads((student(run_dir) / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{SKIPPED_STEPS}", f"ProfilerStep#{SKIPPED_STEPS + 1}"}, "steady ones"
    assert any(event.get("name") == "aten::addmm" for event in events)
    assert set(logged(run_dir)[-1]).isdisjoint({"gpu_memory", "model_flops_utilisation"})


def test_deterministic_algorithms(alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, seen = Trainer._count, []

    def looks(self: Trainer, *rest: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        count(self, *rest)

    monkeypatch.setattr(Trainer, "_count", looks)
    command(run_dir, "train.deterministic=true")
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_deterministic_mode_asks_cublas_and_puts_back_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS repeats its bits only with the workspace that this variable fixes."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(True):
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "a user's own choice stays"


def test_what_has_no_deterministic_algorithm_is_one_line() -> None:
    with (
        pytest.raises(
            UserError,
            match=r"train.deterministic: x does not have a deterministic .*set train.deterministic: false",
        ),
        deterministic(True),
    ):
        raise RuntimeError("x does not have a deterministic implementation\nmore")
    with pytest.raises(RuntimeError, match="out of memory"), deterministic(True):
        raise RuntimeError("out of memory")
    assert not torch.are_deterministic_algorithms_enabled()
