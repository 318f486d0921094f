"""The demo's material: made where it is absent, completed where it is not whole, left alone where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.demo import material
from infra.demo.material import make_material


def test_material_is_made_completed_and_then_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "CORPUS", {"train": (1, 1_000)})
    make_material(tmp_path)
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
    make_material(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    written = {path: path.stat().st_ino for path in files}
    make_material(tmp_path)
    assert {path: path.stat().st_ino for path in files} == written
