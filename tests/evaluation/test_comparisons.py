"""A report's comparisons: retention, the share of the gap closed, and the ends of intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.evaluation.report_content import compare, row, three_rows


def test_an_interval_ends_where_its_score_does() -> None:
    """Matthews goes from -1 to 1, accuracy from 0 to 1."""
    rows = three_rows()
    compare(rows, error=3.0)
    ends = rows["undistilled"]["intervals"]["scores"]
    assert ends == {"CoLA": {"low": -1.0, "high": 1.0}, "SST-2": {"low": 0.0, "high": 1.0}}


def test_retention(content: dict[str, Any]) -> None:
    student = content["rows"]["student"]
    assert student["retention"] == pytest.approx(0.6 / 0.65)
    assert student["retention_by_task"] == {"CoLA": pytest.approx(0.75), "SST-2": 1.0}
    assert content["rows"]["teacher"]["retention"] is None


def test_retention_of_a_teacher_without_score_is_undefined() -> None:
    rows = {"teacher": row(0.0, 0.5, 1), "student": row(0.1, 0.5, 1)}
    compare(rows)
    assert rows["student"]["retention_by_task"]["CoLA"] is None
    assert rows["student"]["intervals"]["retention_by_task"]["CoLA"] is None


def test_gap_closed(content: dict[str, Any]) -> None:
    student, teacher, undistilled = (content["rows"][name] for name in ("student", "teacher", "undistilled"))
    assert student["gap_closed_by_task"] == {"CoLA": pytest.approx(0.75), "SST-2": pytest.approx(1.0)}
    assert student["gap_closed"] == pytest.approx((0.6 - 0.44) / (0.65 - 0.44))
    ends = student["intervals"]["gap_closed_by_task"]
    assert ends["SST-2"] is None  # two points between teacher and undistilled, with errors of two
    assert 0.55 < ends["CoLA"]["low"] < 0.65 < 0.85 < ends["CoLA"]["high"] < 1
    assert teacher["gap_closed"] is None
    assert undistilled["gap_closed_by_task"] == {"CoLA": None, "SST-2": None}
    without = {"teacher": teacher, "student": student | {"references": {}}}
    compare(without)
    assert without["student"]["gap_closed"] is None


def test_intervals_of_scores(content: dict[str, Any]) -> None:
    ends = content["rows"]["student"]["intervals"]
    half = 1.96 * 0.02
    assert ends["scores"]["CoLA"] == {
        "low": pytest.approx(0.3 - half, abs=1e-4),
        "high": pytest.approx(0.3 + half, abs=1e-4),
    }
    half /= np.sqrt(2)
    assert ends["macro"] == {
        "low": pytest.approx(0.6 - half, abs=1e-4),
        "high": pytest.approx(0.6 + half, abs=1e-4),
    }
    rows = three_rows() | {"undistilled": row(-0.9, 0.5, 1)}
    compare(rows, error=0.2)
    assert rows["undistilled"]["intervals"]["scores"]["CoLA"]["low"] == -1.0
    assert rows["teacher"]["intervals"]["scores"]["SST-2"]["high"] == 1.0
