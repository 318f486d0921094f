"""The C++ kernels, built for registers of 4, 8 and 16 numbers: the bits do not depend on which."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infra.cpu import cpu_dropout, native
from offline_teacher.inference import reduction_kernel
from student_train.objectives import native_kl, native_relations

WIDTHS = (4, 8, 16)
DTYPES = (torch.float32, torch.bfloat16)
ROWS, V = 5, 3_001  # more than one group of the reduction, and a row that ends within a vector


def _logits(dtype: torch.dtype, seed: int) -> Tensor:
    scales = torch.tensor([0.01, 1.0, 4.0, 15.0, 40.0])
    logits = torch.randn(ROWS, V, generator=torch.Generator().manual_seed(seed)) * scales[:, None]
    return logits.to(dtype)


def _reduced() -> list[Tensor]:
    found: list[Tensor] = []
    for dtype in DTYPES:
        logits = _logits(dtype, 0)
        logits[1, 40], logits[2, 2_000], logits[3, 3_000] = torch.inf, -torch.inf, torch.nan
        for k in (1, 64, 1_100):
            found += reduction_kernel.reduce_logits(logits, k, (0.7, 1.0, 2.0))
    return found


def _exact_losses() -> list[Tensor]:
    labels = torch.tensor([0, V - 1, -100, 1_500, -100])
    scales = torch.linspace(0.1, 1.0, ROWS), (labels >= 0) * torch.linspace(1.0, 0.3, ROWS)
    biases = torch.randn(2, V, generator=torch.Generator().manual_seed(3))
    found: list[Tensor] = []
    for dtype in DTYPES:
        for temperature, mlm in ((1.0, True), (2.0, True), (3.0, True), (2.0, False)):
            s, t = _logits(dtype, 1), _logits(dtype, 2)
            found += [
                *native_kl.exact_loss(s, biases[0], t, biases[1], labels, *scales, temperature, mlm),
                s,
            ]
    return found


def _relations() -> list[Tensor]:
    generator, counts = torch.Generator().manual_seed(5), torch.tensor([37, 21])
    found: list[Tensor] = []
    for dtype in DTYPES:
        student, teacher = (torch.randn(2, 37, d * 3, generator=generator).to(dtype) for d in (6, 20))
        value, gradient = native_relations.summed_kl(student, teacher, counts, 3, True)
        assert gradient is not None
        found += [value, gradient]
    return found


def _dropped() -> list[Tensor]:
    torch.manual_seed(0)
    return [cpu_dropout.apply_dropout(_logits(dtype, 4), p) for dtype in DTYPES for p in (0.1, 0.5)]


@pytest.mark.parametrize(
    ("module", "work"),
    [
        (reduction_kernel, _reduced),
        (native_kl, _exact_losses),
        (native_relations, _relations),
        (cpu_dropout, _dropped),
    ],
    ids=["reduction", "exact_loss", "relations", "dropout"],
)
def test_the_width_of_registers_does_not_change_a_bit(
    module: Any, work: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All are built alike, and soon: how products and sums join in one rounding is the optimiser's choice."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = []
    for width in WIDTHS:
        with monkeypatch.context() as patch:
            patch.setattr(native, "FLAGS", (*native.FLAGS, "-O1", f"-DVECTOR_WIDTH={width}"))
            library = module._library.__wrapped__()
            patch.setattr(module, "_library", lambda library=library: library)
            found.append(work())
    for parts in zip(*found, strict=True):
        for other in parts[1:]:
            torch.testing.assert_close(other, parts[0], rtol=0, atol=0, equal_nan=True)
    assert len({path.read_bytes() for path in tmp_path.rglob("*.so")}) == len(WIDTHS)


def _build_all(root: Path, home: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HOME": home}
    command = [sys.executable, "-m", "infra.cpu.native"]
    return subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)


def _finished(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    _, said = process.communicate(timeout=240)
    return process.returncode, said.splitlines()


def test_two_processes_build_everything_once_and_say_what(root_dir: Path, tmp_path: Path) -> None:
    sources = {path.name for name in native.PACKAGES for path in (root_dir / name).rglob("*.cpp")}
    assert len(sources) == 4
    found = [_finished(process) for process in [_build_all(root_dir, str(tmp_path)) for _ in range(2)]]
    assert [code for code, _ in found] == [0, 0]
    said = sorted(line for _, lines in found for line in lines)
    assert said == sorted(f"building {name} for this processor, a few seconds" for name in sources)
    assert len(list(tmp_path.rglob("*.so"))) == 4
    assert _finished(_build_all(root_dir, str(tmp_path))) == (0, [])


def test_a_home_that_cannot_be_written_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One library is enough, because all are built in the same way."""
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(native, "PACKAGES", ("infra",))
    assert native.build_all() == 0
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(list(tmp_path.rglob("*.so"))) == 1


def test_without_a_compiler_it_is_said_what_to_install(
    root_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = _finished(_build_all(root_dir, str(tmp_path)))
    assert code == 1
    assert any("no C++ compiler was found; install a C++ compiler" in line for line in said)


@pytest.mark.parametrize("compiler", ["/usr/bin/gcc", None])
def test_triton_needs_a_c_compiler(compiler: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With which it builds the launcher of each kernel, at the first launch."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    assert native.has_triton.__wrapped__() == (compiler is not None)
