"""The demo's teacher: the same bytes from every start, so that a stopped demo can end with the same store."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

TRAIN = """
import sys
from pathlib import Path
from infra.demo.documents import documents
from infra.demo.teacher import train_teacher
train_teacher(list(documents(1, 60_000)), Path(sys.argv[1]), steps=4)
"""


def trained(directory: Path, threads: int) -> str:
    """Digest of the weights of a teacher trained in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", TRAIN, str(directory)], env=environment, check=True)
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_same_weights_whatever_the_number_of_threads_in_the_environment(tmp_path: Path) -> None:
    assert trained(tmp_path / "one", threads=1) == trained(tmp_path / "two", threads=2)
