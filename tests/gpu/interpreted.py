"""``TRITON_INTERPRET=1 python -m tests.gpu.interpreted``: compares our Triton kernels on a CPU with float64.

Triton reads the variable when it is imported, so these checks need a separate process. `test_program` runs
them if Triton is installed.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch

from student_train.data.collate import NO_LABEL
from student_train.objectives import kl_loss


def reduction() -> None:
    """Checks top-k and logsumexp, including ties and negative zero."""
    from offline_teacher.inference.reduction_triton import reduce_logits

    cases = [(3, 37, torch.float32, 5), (4, 2001, torch.bfloat16, 16), (2, 3000, torch.float16, 64)]
    for rows, vocab_size, dtype, top_k in [*cases, (2, 100, torch.float32, 100)]:
        generator = torch.Generator().manual_seed(vocab_size)
        logits = (4 * torch.randn(rows, vocab_size, generator=generator)).to(dtype)
        logits[0, 1], logits[0, 3] = 0.0, -0.0
        logits[1, 10:30] = logits[1].amax()
        ids, values, sums = reduce_logits(logits, top_k, (1.0, 2.0))
        expected = logits.double().sort(dim=1, descending=True, stable=True)
        assert torch.equal(ids, expected.indices[:, :top_k])
        assert torch.equal(values.double(), expected.values[:, :top_k])
        exact = torch.stack([torch.logsumexp(logits.double() / T, 1) for T in (1.0, 2.0)], 1)
        torch.testing.assert_close(sums.double(), exact, rtol=2e-6, atol=2e-6)


def exact_loss() -> None:
    """Checks losses and gradients of exact soft targets, and that the memory between the rows is
    unchanged."""
    from student_train.objectives.kl_triton import exact_kernel

    label = torch.tensor([0, NO_LABEL, 36, NO_LABEL, 5])
    kl_scale, mlm_scale = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.0]), torch.where(label == NO_LABEL, 0.0, 0.7)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for vocab_size, dtype, temperature, mlm in itertools.product(
        (37, 4096, 9001), dtypes, (1.0, 2.0, 3.5), (True, False)
    ):
        generator = torch.Generator().manual_seed(vocab_size)
        wide = torch.zeros(5, vocab_size + 3).uniform_(-9, 9, generator=generator).to(dtype)
        s, t = wide[:, :vocab_size], (7 * torch.randn(5, vocab_size, generator=generator)).to(dtype)
        # The maximum is the last number of s[0] and the first of t[1].
        s[0], t[1] = s[0].sort().values, t[1].sort(descending=True).values
        scales = kl_scale.double(), mlm_scale.double()
        beside, gradient = wide[:, vocab_size:].clone(), s.double()
        kl, ce = kl_loss.exact_kernel(gradient, t.double(), label, *scales, temperature, mlm)
        found_kl, found_ce = exact_kernel(s, t, label, kl_scale, mlm_scale, temperature, mlm)
        torch.testing.assert_close(found_kl.double(), kl, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(found_ce.double(), ce, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(s.double(), gradient, rtol=torch.finfo(dtype).eps, atol=3e-7)
        assert torch.equal(wide[:, vocab_size:], beside)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("error: set TRITON_INTERPRET=1, with which Triton runs the kernels on a CPU")
    reduction()
    exact_loss()
    print("the kernels agree with float64")
