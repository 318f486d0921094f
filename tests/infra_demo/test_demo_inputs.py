"""The demo's inputs: written where absent, completed where not whole, left alone where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.demo import inputs
from infra.demo.inputs import write_inputs


def test_inputs_are_written_completed_and_then_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "CORPUS", {"train": (1, 1_000)})
    write_inputs(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.parent.name for path in files} == {
        "corpus",
        "teacher",
        "CoLA",
        "SST-2",
        "MRPC",
        "STS-B",
        "RTE",
    }
    (tmp_path / "corpus/train.txt").write_bytes(files[tmp_path / "corpus/train.txt"][:500])
    (tmp_path / "glue/RTE/dev.tsv").unlink()
    write_inputs(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    written = {path: path.stat().st_ino for path in files}
    write_inputs(tmp_path)
    assert {path: path.stat().st_ino for path in files} == written
