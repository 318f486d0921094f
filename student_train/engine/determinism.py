"""Torch's deterministic algorithms, with which a run on a GPU gives the same bits every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from infra.errors import UserError


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """A context in which torch uses only deterministic algorithms; if ``on`` is False, it does nothing.
    Raises UserError if torch has no deterministic algorithm for an operation of the student."""
    if not on:
        yield
        return
    # cuBLAS reads this variable at the process's first matrix product on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"train.deterministic: {reason}; set train.deterministic: false") from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
