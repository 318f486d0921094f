"""A report's tables, and the names of its numbers in tracking."""

from __future__ import annotations

import re
from typing import Any

import pytest

from evaluation.report import plots, tables
from evaluation.report.tracked import numbers
from tests.evaluation.report_content import PNG, compare, family_rows, row


def test_markdown_shows_every_number(content: dict[str, Any]) -> None:
    text = tables.to_markdown(content, ["retention.png"])
    expected = [
        "|  | teacher | student | undistilled | gap closed |",
        "| CoLA | 40.0 [36.1, 43.9] | 30.0 [26.1, 33.9] | 0.0 [-3.9, 3.9] | 75 % [63, 88] |",
        "| SST-2 | 90.0 [86.1, 93.9] | 90.0 [86.1, 93.9] | 88.0 [84.1, 91.9] | unclear |",
        "| macro | 65.0 [62.2, 67.8] | 60.0 [57.2, 62.8] | 44.0 [41.2, 46.8] | 76 % [60, 94] |",
        "| retention |  | 92 % [87, 98] | 68 % [63, 73] |  |",
        "| parameters | 22.00 M | 17.00 M | 17.00 M |  |",
        "| size | 88.0 MB | 68.0 MB | 68.0 MB |  |",
        "| SST-2 dev pass | 3.00 s | 3.00 s | 3.00 s |  |",
        "| p50 | 2.00 ms | 2.00 ms | 2.00 ms |  |",
        "medians of 3 seeds [95 % intervals over examples and seeds]",
        "| CoLA | matthews | 40.00 | 30.00 |",
        "| student | 17.00 M | 68.0 MB | 3.00 | 2.00 | 3.00 | 4.00 | 9.0 | 11.0 |",
        "| student ONNX int8 | 17.00 M | 68.0 MB | 3.00 | 2.00 | 3.00 | 4.00 | 9.0 | 11.0 |",
        "| student | CoLA | 30.00 | 29.00 | 1.00 | 90.0 MB | 23.0 MB | 0.253 | 2.0e-06 |",
        "![retention](retention.png)",
        "- SST-2 dev: 2 rows",
        "Latency: SST-2 dev, 872 rows at batch size 1, 1 thread(s) of Abacus 9, the models taking turns",
        "| student | teacher | -5.0 [-8.9, -1.1] | 0.012 | 0 | 1 |",
        "| student | 90.0 | 80.0 |",
        "| teacher | SST-2 | 4.0 | 0.120 |",
        "| SST-2 | 0 | 444 | 91.0 | 91.0 | 91.0 |",
        "| student | 11.0 | 25.25 | 2.50 | 90 MB |",
        "| student ONNX int8 | 11.0 | 25.25 | 2.50 |  |",
        "| student | SST-2 | 7 | not \\| a &lt;b> film | 1 | 1 (99 %) | 0 (98 %) |",
        "| DistilBERT | 77 | 51.3 |",
    ]
    for line in expected:
        assert line in text


def test_the_table_fits_a_terminal(content: dict[str, Any]) -> None:
    names = ("CoLA", "SST-2", "MRPC", "STS-B", "RTE")
    for one in content["rows"].values():
        one["scores"] = {name: {"score": 0.999} for name in names}
        one["intervals"]["scores"] = dict.fromkeys(names, {"low": 0.998, "high": 1.0})
        one["gap_closed_by_task"] = dict.fromkeys(names, 1.001)
        one["intervals"]["gap_closed_by_task"] = dict.fromkeys(names, {"low": -0.5, "high": 1.25})
    table = tables.summary_table(content)
    assert max(map(len, table.splitlines())) <= 120
    assert "STS-B           99.9 [99.8, 100.0]" in table
    assert "100 % [-50, 125]" in table


def test_one_seed_is_said(content: dict[str, Any]) -> None:
    content["seeds"] = [7]
    assert "of one seed [95 % intervals over examples, not over seeds]" in tables.summary_table(content)


def test_a_second_student_has_its_own_gap(content: dict[str, Any]) -> None:
    rows = {name: content["rows"][name] for name in ("teacher", "student")}
    rows |= {"student (D)": row(0.32, 0.89, 1, "undistilled"), "undistilled": content["rows"]["undistilled"]}
    compare(rows)
    header, *_ = tables.summary_table(content | {"rows": rows}).splitlines()
    assert header.split("  ")[-1].strip() == "gap, student (D)"
    assert rows["student (D)"]["gap_closed_by_task"]["CoLA"] == pytest.approx(0.8)


def test_every_student_is_compared_with_its_own_undistilled_form(content: dict[str, Any]) -> None:
    rows = family_rows()
    compare(rows)
    assert rows["half"]["gap_closed_by_task"]["CoLA"] == pytest.approx(0.75)
    assert rows["tiny"]["gap_closed_by_task"]["CoLA"] == pytest.approx((0.2 - 0.1) / (0.4 - 0.1))
    assert rows["other"]["gap_closed_by_task"]["CoLA"] == pytest.approx(0.9)
    assert rows["undistilled tiny"]["gap_closed"] is None
    family = content | {"rows": rows, "students": ["half", "tiny", "other"]}
    overview = tables.summary_table(family).splitlines()
    assert [line.split("  ")[0] for line in overview[2:8]] == list(rows)
    assert max(map(len, overview)) <= 110
    tiny = next(line for line in overview if line.startswith("tiny"))
    assert "50.0 [47.2, 52.8]" in tiny  # macro
    assert "77 % [72, 82]" in tiny  # retention
    text = tables.to_markdown(family, [])
    assert "| tiny | 50.0 [47.2, 52.8] | 77 % [72, 82] | 40 % [" in text
    assert "| gap, half | gap, tiny | gap, other |" in text


def test_without_a_teacher_scores_stand_alone(content: dict[str, Any]) -> None:
    rows = {name: one for name, one in family_rows().items() if name != "teacher"}
    compare(rows)
    assert all(one["retention"] is None and one["gap_closed"] is None for one in rows.values())
    family = content | {"rows": rows, "students": ["half", "tiny", "other"]}
    text = tables.to_markdown(family, ["score_latency.png"])
    assert "| half | 60.0 [57.2, 62.8] |  |  | 17.00 M |" in text
    assert "retention |" not in text.split("## Every metric")[0].replace("| retention | gap closed |", "")
    assert "unclear" not in text.split("Scores:")[0]
    assert plots.score_against_latency(family).startswith(PNG)


def test_every_number_has_a_name(content: dict[str, Any]) -> None:
    found = numbers(content)
    assert found["student/CoLA/matthews"] == 0.3
    assert found["teacher/latency/throughput/8"] == 9.0
    assert found["student/retention_by_task/CoLA"] == pytest.approx(0.75)
    assert "teacher/retention" not in found
    assert not [name for name in found if "seed_scores" in name or "differences" in name]
    assert found["student/gap_closed_by_task/CoLA"] == pytest.approx(0.75)
    ends = content["rows"]["student"]["intervals"]
    assert found["student/intervals/CoLA/low"] == ends["scores"]["CoLA"]["low"]
    assert found["student/intervals/gap_closed/high"] == ends["gap_closed"]["high"]
    assert "student/intervals/gap_closed_by_task/SST-2" not in found
    assert found["student ONNX int8/latency/p50_ms"] == 2.0
    assert found["export/student/CoLA/int8_lost"] == 0.01


def test_names_of_numbers_are_ones_that_mlflow_takes(content: dict[str, Any]) -> None:
    content["rows"]["student (D)"] = content["rows"]["student"]
    content["latency_rows"]["ELMo-size (random weights)"] = content["latency_rows"]["student ONNX int8"]
    found = numbers(content)
    assert found["student D/CoLA/matthews"] == 0.3
    assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in found)
