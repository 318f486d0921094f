"""Tests the GPU program on a CPU: all parts run, a wrong kernel fails its check, and FLOP counts are
right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from offline_teacher.inference import reduction
from offline_teacher.models import head
from student_train.data import pinned_buffers
from student_train.data.collate import Batch
from student_train.objectives import native_relations, relations, triple_loss
from tests.gpu import __main__ as program
from tests.gpu import checks, copies, models, speed

CPU = torch.device("cpu")
SIZE = models.size_for(CPU)
TRAINER = "check_resume"
"""This part and `speed_engine_step` start torch's process group, so both run in another process."""


def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = _program("--profile", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert list(results["parts"]) == list(program.PARTS)
    assert results["machine"]["type"] == "cpu"
    assert "skipped" not in results["parts"][TRAINER]
    for name in ("speed_pass", "speed_plain_step", "speed_engine_step"):
        part = results["parts"][name]
        assert part["rows"]
        assert all(row["tokens_per_second"] > 0 and row["utilisation"] is None for row in part["rows"])
        for operations in part["profiles"].values():
            assert 0.5 < sum(operation["share"] for operation in operations) <= 1.001


@pytest.mark.slow
def test_it_needs_no_more_than_a_gpu_machine_has(tmp_path: Path) -> None:
    """Without these packages the program still runs, and reports the parts that need them as skipped."""
    absent = ("deepspeed", "ray", "mlflow", "datasets", "hjson")
    arguments = ["tests.gpu", "--device", "cpu", "--out", str(tmp_path / "gpu.json")]
    arguments += [word for name in ("check_loss", "check_training") for word in ("--skip", name)]
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); sys.argv = {arguments}\n"
    code += "import importlib.util as util; find = util.find_spec\n"
    code += f"util.find_spec = lambda name, *rest: None if name in {absent} else find(name, *rest)\n"
    code += "runpy.run_module('tests.gpu', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{TRAINER} ... skipped: DeepSpeed is not installed here" in done.stdout
    assert "speed_engine_step ... skipped" in done.stdout
    assert "speed_plain_step ... ok" in done.stdout


def _program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=dict(os.environ))


def test_a_check_that_fails_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = reduction.reduce_logits

    def wrong(*arguments: object) -> object:
        ids, values, logsumexp = real(*arguments)  # type: ignore[arg-type]
        return ids, values, logsumexp + 1e-3

    monkeypatch.setattr(checks, "reduce_logits", wrong)
    skipped = [word for name in program.PARTS if name != "check_reduction" for word in ("--skip", name)]
    assert program.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json"), *skipped]) == 1
    assert "logsumexp is off by 0.001" in capsys.readouterr().out


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = triple_loss.VocabularyLoss.backward

    def wrong(ctx: object, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dz, dweight, dbias, nothing = real(ctx, *gradients)
        assert dweight is not None
        return dz, dweight * 1.01, dbias, nothing

    monkeypatch.setattr(triple_loss.VocabularyLoss, "backward", staticmethod(wrong))
    with pytest.raises(AssertionError, match="float32"):
        checks.loss(CPU, SIZE)


def test_a_wrong_relation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_relations, "_library", lambda: None)
    real = relations._scale
    monkeypatch.setattr(relations, "_scale", lambda x, heads: real(x, heads) * 1.001)
    with pytest.raises(AssertionError, match="float32, full"):
        checks.relations(CPU, SIZE)


def test_a_wrong_rounding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.quantise

    def wrong(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps, scale = real(states)
        return torch.where(steps == 100, 101, steps), scale

    monkeypatch.setattr(checks, "quantise", wrong)
    with pytest.raises(AssertionError, match="steps"):
        checks.quantisation(CPU, SIZE)


def test_rows_appended_to_the_decoder_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows added for a GPU's tensor cores change neither value nor gradient of the loss."""
    monkeypatch.setitem(head.ALIGNED_ROWS, "cpu", 64)
    monkeypatch.setattr(head, "ALIGNED_FROM", 0)
    weight, bias = head.aligned_decoder(torch.ones(1003, 8), torch.ones(1003))
    assert weight.shape == (1024, 8)
    assert bias.shape == (1024,)
    checks.loss(CPU, SIZE)


def test_the_relation_kernel_of_a_gpu_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the kernel's arithmetic uncompiled, on padded relation vectors."""
    monkeypatch.setattr(native_relations, "_library", lambda: None)
    monkeypatch.setattr(relations, "_COMPILED", ("cpu",))
    monkeypatch.setitem(relations._ALIGNED, "cpu", 8)
    called = []

    def fused(kernel: Callable[..., Any]) -> Callable[..., Any]:
        called.append(kernel)
        return kernel

    monkeypatch.setattr(relations, "fused", fused)
    checks.relations(CPU, SIZE)
    assert called


def test_triton_kernels_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "agree with float64" in done.stdout


def test_flops_are_those_of_bert_base() -> None:
    config = BertConfig()
    weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert speed.encoder_flops(config, 128, 12) == 2 * weights + 12 * 4 * 128 * 768
    assert speed.head_flops(config) == 2 * 768 * (768 + 30_522)


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert program.main(["--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_buffer_that_is_filled_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If copies end late, the device reads numbers of another batch, which the check must find."""
    real, late = pinned_buffers.PinnedBuffer.send, []

    def send(self: pinned_buffers.PinnedBuffer, batch: Batch) -> Batch:
        late.append(real(self, batch))
        return late[-2] if len(late) % 5 == 0 else late[-1]

    monkeypatch.setattr(pinned_buffers.PinnedBuffer, "send", send)
    with pytest.raises(AssertionError, match=r"batch \d+: "):
        copies.ring(CPU, SIZE)
