"""The table that the demo ends with: from a kept report, and from a demo that is run to its end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs.demo_table import KEPT, kept_result
from infra.demo.result import result_table
from tests.conftest import ROOT


def cells(table: str) -> dict[str, list[str]]:
    """First cell of each line -> the others."""
    lines = [re.split(r"  +", line.strip()) for line in table.splitlines() if "--" not in line]
    return {first: others for first, *others in lines}


@pytest.fixture
def kept() -> dict[str, Any]:
    return json.loads(KEPT.read_text())


def test_each_student_is_beside_the_teacher_and_its_undistilled_shape(kept: dict[str, Any]) -> None:
    rows = kept["report"]["rows"]
    rows["undistilled half"]["macro"], rows["undistilled small"]["macro"] = 0.323, 0.123
    rows["small"]["gap_closed"] = None
    found = cells(result_table(kept["report"], kept["held_out"]))
    assert found["teacher"] == ["half", "small", "gap closed"]
    assert [cell.split()[0] for cell in found["mean"][:3]] == [
        f"{100 * rows[name]['macro']:.1f}" for name in ("teacher", "half", "small")
    ]
    assert found["mean"][3] == f"{100 * rows['half']['gap_closed']:.0f} %, unclear"
    assert [cell.split()[0] for cell in found["undistilled mean"]] == ["32.3", "12.3"]
    low = rows["half"]["intervals"]["scores"]["RTE"]["low"]
    assert found["RTE"][1].split()[1] == f"[{100 * low:.1f},"


def test_a_student_of_relations_alone_has_no_masked_lm_loss(kept: dict[str, Any]) -> None:
    losses = kept["held_out"]["half"]
    expected = [f"{losses[name]:.3f}" for name in ("teacher_mlm_loss", "mlm_loss")]
    assert cells(result_table(kept["report"], kept["held_out"]))["masked-LM loss"] == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_prints_what_the_documentation_shows(tmp_path: Path, kept: dict[str, Any]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "infra.demo"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = kept_result(tmp_path / "runs" / "demo")
    table = result_table(result["report"], result["held_out"])
    assert table in done.stdout
    assert list(cells(table)) == list(cells(result_table(kept["report"], kept["held_out"])))
    for name in ("half", "small"):
        row, undistilled = (
            result["report"]["rows"][key]["intervals"]["macro"] for key in (name, f"undistilled {name}")
        )
        assert row["low"] > undistilled["high"]
