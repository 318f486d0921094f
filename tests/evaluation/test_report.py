from __future__ import annotations

from typing import Any

import pytest

from evaluation import plots, report
from evaluation.recipe_run import numbers

PNG = b"\x89PNG\r\n\x1a\n"


def row(cola: float, sst: float, parameters: int) -> dict[str, Any]:
    return {
        "scores": {"CoLA": {"matthews": cola, "score": cola}, "SST-2": {"accuracy": sst, "score": sst}},
        "macro": (cola + sst) / 2,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "latency": {
            "total_seconds": 3.0, "p50_ms": 2.0, "p95_ms": 3.0, "p99_ms": 4.0,
            "throughput": {"8": 9.0, "32": 11.0},
        },
    }  # fmt: skip


@pytest.fixture
def content() -> dict[str, Any]:
    rows = {"teacher": row(0.4, 0.9, 22_000_000), "student": row(0.3, 0.9, 17_000_000)}
    report.add_retention(rows)
    timed = {key: value for key, value in row(0, 0, 17_000_000).items() if key not in ("scores", "macro")}
    return {
        "latency_rows": {"student ONNX int8": timed},
        "devices": {
            "CoLA": {
                "score": 0.3, "int8_score": 0.29, "int8_lost": 0.01, "int8_size_ratio": 0.253,
                "bytes": {"model.onnx": 90_000_000, "model.int8.onnx": 23_000_000},
                "difference": {"float32": 2e-6, "int8": 0.1},
            }
        },
        "recipe": "tiny", "seeds": [0, 1, 2], "rows": rows, "notes": ["SST-2 dev: 2 rows"],
        "latency_setting": {"texts": "SST-2 dev", "sentences": 872, "threads": 1, "device": "cpu"},
    }  # fmt: skip


def test_retention(content: dict[str, Any]) -> None:
    student = content["rows"]["student"]
    assert student["retention"] == pytest.approx(0.6 / 0.65)
    assert student["retention_by_task"] == {"CoLA": pytest.approx(0.75), "SST-2": 1.0}
    assert content["rows"]["teacher"]["retention"] is None


def test_retention_of_a_teacher_without_score_is_undefined() -> None:
    rows = {"teacher": row(0.0, 0.5, 1), "student": row(0.1, 0.5, 1)}
    report.add_retention(rows)
    assert rows["student"]["retention_by_task"]["CoLA"] is None


def test_markdown_shows_every_number(content: dict[str, Any]) -> None:
    text = report.to_markdown(content, ["retention.png"])
    expected = [
        "| student | 30.0 | 90.0 | 60.0 | 92.3 % | 17.00 M | 68.0 MB | 3.00 s | 2.00 ms |",
        "| CoLA | matthews | 40.00 | 30.00 |",
        "| student | 17.00 M | 68.0 MB | 3.00 | 2.00 | 3.00 | 4.00 | 9.0 | 11.0 |",
        "| student ONNX int8 | 17.00 M | 68.0 MB | 3.00 | 2.00 | 3.00 | 4.00 | 9.0 | 11.0 |",
        "| CoLA | 30.00 | 29.00 | 1.00 | 90.0 MB | 23.0 MB | 0.253 | 2.0e-06 |",
        "![retention](retention.png)",
        "- SST-2 dev: 2 rows",
        "| size | SST-2 dev pass | p50 |",
        "Latency: SST-2 dev, 872 rows at batch size 1, 1 thread(s)",
        "| DistilBERT | 77 | 51.3 |",
    ]
    for line in expected:
        assert line in text


def test_plots_are_images(content: dict[str, Any]) -> None:
    history = [
        {"step": 10, "loss": 2.0, "kl": 1.0},
        {"step": 20, "loss": 1.0, "kl": 0.5},
        {"event": "resumed"},
    ]
    images = [plots.retention(content), plots.score_against_latency(content), plots.loss_curves(history)]
    for image in images:
        assert image is not None
        assert image.startswith(PNG)
    assert plots.loss_curves([]) is None


def test_every_number_has_a_name(content: dict[str, Any]) -> None:
    found = numbers(content)
    assert found["student/CoLA/matthews"] == 0.3
    assert found["teacher/latency/throughput/8"] == 9.0
    assert found["student/retention_by_task/CoLA"] == pytest.approx(0.75)
    assert "teacher/retention" not in found
    assert found["student ONNX int8/latency/p50_ms"] == 2.0
    assert found["export/CoLA/int8_lost"] == 0.01


def test_names_of_numbers_are_ones_that_mlflow_takes(content: dict[str, Any]) -> None:
    import re

    content["rows"]["student (D)"] = content["rows"]["student"]
    content["latency_rows"]["ELMo-size (random weights)"] = content["latency_rows"]["student ONNX int8"]
    found = numbers(content)
    assert found["student D/CoLA/matthews"] == 0.3
    assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in found)
