"""The kernels of KL and CE: in C++, compiled by torch, and uncompiled after a compiler failed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from infra.cpu import native
from student_train.objectives import kl_loss, native_kl
from student_train.objectives import triple_loss as losses
from tests.student_train.objectives.loss_cases import (
    fused_loss,
    gradients,
    make_case,
    relative_error,
    target_of,
)


def test_the_native_kernel_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies that are no multiple of 16, labels at both ends, rows with scale 0, two threads."""
    generator = torch.Generator().manual_seed(0)
    for v, threads in itertools.product((2, 15, 16, 17, 64, 67, 1000), (1, 2)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        s, t = (3 * torch.randn(9, v, generator=generator) for _ in range(2))
        labels = torch.tensor([0, v - 1, -100, 1, -100, v // 2, 0, v - 1, -100])
        kl_scale, mlm_scale = torch.rand(9, generator=generator), (labels >= 0) * torch.rand(9)
        kl_scale[3] = 0.0
        biases = torch.randn(2, v, generator=generator)
        wide = s.double() + biases[0]
        expected = kl_loss.exact_kernel(
            wide, t.double() + biases[1], labels, kl_scale.double(), mlm_scale.double(), 2.0, True
        )
        assert native_kl.usable(s, t)
        found = native_kl.exact_loss(s, biases[0], t, biases[1], labels, kl_scale, mlm_scale, 2.0, True)
        for one, oracle in zip((s, *found), (wide, *expected), strict=True):
            torch.testing.assert_close(one.double(), oracle, rtol=2e-6, atol=1e-6)


def test_without_a_cpp_compiler_the_exact_target_is_compiled_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "COMPILERS", ())
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler was found"):
        assert native_kl._library.__wrapped__() is None
    monkeypatch.setattr(native_kl, "_library", lambda: None)
    kernels: list[kl_loss.Kernel] = []

    def fused(kernel: kl_loss.Kernel) -> kl_loss.Kernel:
        kernels.append(kernel)
        return kernel

    monkeypatch.setattr(losses, "fused", fused)
    case = make_case(19).to(torch.float32)
    assert torch.isfinite(fused_loss(case, target_of(case, None), compile=True).total)
    assert set(kernels) == {kl_loss.exact_kernel}


@pytest.mark.parametrize("k", [None, 6])
def test_compiled_equals_eager(k: int | None) -> None:
    case = make_case(18, n=13).to(torch.float32)
    eager, compiled = (
        fused_loss(case, target_of(case, k), compile=on, chunk_size=8).total for on in (False, True)
    )
    assert float(compiled.detach()) == pytest.approx(float(eager.detach()), rel=1e-5)
    for a, b in zip(gradients(compiled, case.leaves), gradients(eager, case.leaves), strict=True):
        assert relative_error(a, b.double()) <= 1e-5


COMPARED = """
import torch
from student_train.objectives import kl_loss
generator = torch.Generator().manual_seed(0)
logits, ids = torch.randn(8, 50, generator=generator), torch.arange(48).view(8, 6)
p, scale = torch.full((8, 6), 1 / 8), torch.ones(8)
given = ids, p, torch.full((8,), 1 / 4), ids[:, 0], scale, scale, 2.0, True
results = [kernel(logits.clone(), *given) for kernel in
           (kl_loss.topk_kernel, kl_loss.fused(kl_loss.topk_kernel))]
torch.testing.assert_close(*results)
"""


@pytest.mark.slow
def test_two_kinds_of_processor_can_share_the_cache_of_kernels(root_dir: Path, tmp_path: Path) -> None:
    """Torch's own cache key is the same for AVX2 and AVX-512, which would give wrong numbers with AVX-512."""
    for capability in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **capability}
        done = subprocess.run(
            [sys.executable, "-c", COMPARED],
            cwd=root_dir,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-1000:]


@pytest.fixture
def compiled_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[kl_loss.Kernel], None]]:
    """Returns a function that sets what torch.compile makes of a kernel."""
    kl_loss.fused.cache_clear()
    yield lambda kernel: monkeypatch.setattr(torch, "compile", lambda *_, **__: kernel)
    kl_loss.fused.cache_clear()


def test_falls_back_to_eager_with_one_warning(compiled_to: Callable[..., None]) -> None:
    """The compiled kernel may also fail after it has overwritten logits."""
    calls = itertools.count()

    def broken(s: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        next(calls)
        s.fill_(7.0)
        raise RuntimeError("no working C++ compiler found")

    compiled_to(broken)
    case = make_case(19)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = fused_loss(case, target_of(case, 6), compile=True)
        assert float(found.total.detach()) == float(fused_loss(case, target_of(case, 6)).total.detach())
        fused_loss(make_case(19, v=41), target_of(make_case(19, v=41), 6), compile=True)
    assert next(calls) == 2  # once for each shape
    assert [str(w.message) for w in seen if "uncompiled" in str(w.message)] != []
    assert len(seen) == 1


def test_an_error_of_a_kernel_that_worked_is_raised(compiled_to: Callable[..., None]) -> None:
    calls = itertools.count()

    def breaks_later(*arguments: Any) -> tuple[Tensor, Tensor]:
        if next(calls) > 1:
            raise RuntimeError("an illegal memory access")
        return kl_loss.topk_kernel(*arguments)

    compiled_to(breaks_later)
    case = make_case(19)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fused_loss(case, target_of(case, 6), compile=True)


def test_no_memory_is_no_failure_of_the_compiler(compiled_to: Callable[..., None]) -> None:
    def too_large(*_: object) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError

    compiled_to(too_large)
    case = make_case(19)
    with pytest.raises(torch.OutOfMemoryError):
        fused_loss(case, target_of(case, 6), compile=True)


@pytest.mark.parametrize("temperature", [0.2, 2.0])
def test_padding_of_the_vocabulary_changes_no_kl(temperature: float) -> None:
    """Below T = 0.5 the padding's logits divided by T are -inf."""
    student, teacher = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    log_p, log_q = (functional.log_softmax(z.double() / temperature, 1) for z in (teacher, student))
    expected = (log_p.exp() * (log_p - log_q)).sum(1)
    s, t = (functional.pad(z, (0, 3), value=torch.finfo(z.dtype).min / 2) for z in (student, teacher))
    ones = torch.ones(4)
    kl, _ = kl_loss.exact_kernel(s, t, torch.zeros(4, dtype=torch.int64), ones, ones, temperature, True)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(s).all()
