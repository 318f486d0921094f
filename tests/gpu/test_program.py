"""The GPU program's own CPU half: every part runs, a wrong kernel fails its check, figures are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from offline_teacher import reduction
from student_train import losses
from tests.gpu import __main__ as program
from tests.gpu import checks, models, speed

CPU = torch.device("cpu")


def test_every_part_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert program.main(["--device", "cpu", "--out", str(out)]) == 0, capsys.readouterr().out
    results = json.loads(out.read_text())
    assert list(results["parts"]) == list(program.PARTS)
    assert results["machine"]["type"] == "cpu"
    for name in ("speed_pass", "speed_student"):
        rows = results["parts"][name]["rows"]
        assert rows
        assert all(row["tokens_per_second"] > 0 and row["utilisation"] is None for row in rows)


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
    real = losses.VocabularyLoss.backward

    def wrong(ctx: object, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dz, dweight, dbias, nothing = real(ctx, *gradients)
        return dz, dweight * 1.01, dbias, nothing

    monkeypatch.setattr(losses.VocabularyLoss, "backward", staticmethod(wrong))
    with pytest.raises(AssertionError, match="float32"):
        checks.loss(CPU, models.size_for(CPU))


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


def test_it_needs_no_more_than_a_gpu_machine_has(tmp_path: Path) -> None:
    """torch, transformers, pyarrow and xxhash are there; these are not."""
    absent = ("deepspeed", "ray", "mlflow", "datasets", "pydantic", "hjson")
    skipped = [word for name in list(program.PARTS)[1:] for word in ("--skip", name)]
    arguments = ["tests.gpu", "--device", "cpu", "--out", str(tmp_path / "gpu.json"), *skipped]
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); sys.argv = {arguments}\n"
    code += "runpy.run_module('tests.gpu', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check_reduction ... ok" in done.stdout
