from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.text import Annotation

from evaluation.measures.intervals import Component, Estimates, mean
from evaluation.report import comparisons, plots, tables
from evaluation.report import content as report_content
from evaluation.report.tracked import numbers
from evaluation.sources.catalogue import TASKS

PNG = b"\x89PNG\r\n\x1a\n"


def row(cola: float, sst: float, parameters: int, undistilled: str | None = None) -> dict[str, Any]:
    return {
        "student": None if undistilled is None else undistilled.partition(" ")[2] or "student",
        "references": {} if undistilled is None else {"random": undistilled},
        "scores": {"CoLA": {"matthews": cola, "score": cola}, "SST-2": {"accuracy": sst, "score": sst}},
        "seed_scores": {"CoLA": {"0": cola}, "SST-2": {"0": sst}},
        "macro": (cola + sst) / 2,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "latency": {
            "total_seconds": 3.0, "p50_ms": 2.0, "p95_ms": 3.0, "p99_ms": 4.0,
            "throughput": {"8": 9.0, "32": 11.0},
        },
        "peak_memory": 90_000_000,
        "cost": {"seconds": 90_909.1, "money": 2.5, "kwh": None},
    }  # fmt: skip


def estimates(rows: dict[str, dict[str, Any]], error: float = 0.02) -> dict[str, Estimates]:
    """Of every task, each model with an error of its own."""
    component = Component(np.eye(len(rows)) * error**2, 1e9)
    return {
        task: Estimates(np.asarray([row["scores"][task]["score"] for row in rows.values()]), (component,))
        for task in next(iter(rows.values()))["scores"]
    }


def compare(rows: dict[str, dict[str, Any]], error: float = 0.02) -> None:
    tasks = estimates(rows, error)
    comparisons.add_comparisons(rows, tasks, mean(list(tasks.values())), TASKS)


def three_rows() -> dict[str, dict[str, Any]]:
    return {
        "teacher": row(0.4, 0.9, 22_000_000),
        "student": row(0.3, 0.9, 17_000_000, "undistilled"),
        "undistilled": row(0.0, 0.88, 17_000_000),
    }


def details(name: str) -> dict[str, Any]:
    labels = {label: {"precision": 0.9, "recall": 0.9, "f1": 0.91, "support": 444.0} for label in "01"}
    sst = {
        "agreement": 0.8, "calibration": {"error": 0.04, "brier": 0.12}, "labels": labels,
        "confusion": [[400, 44], [30, 398]],
    }  # fmt: skip
    return {"CoLA": {"agreement": 0.9}, "SST-2": sst}


def disagreement() -> dict[str, Any]:
    return {
        "example": "7", "text": "not | a <b> film", "label": "1", "teacher": "1 (99 %)",
        "student": "0 (98 %)", "distance": 0.97, "split": "dev",
    }  # fmt: skip


@pytest.fixture
def content() -> dict[str, Any]:
    rows = three_rows()
    compare(rows)
    timed = {key: rows["student"][key] for key in ("parameters", "bytes", "latency", "cost")}
    return {
        "latency_rows": {"student ONNX int8": timed},
        "devices": {
            "student": {
                "CoLA": {
                    "score": 0.3, "int8_score": 0.29, "int8_lost": 0.01, "int8_size_ratio": 0.253,
                    "bytes": {"model.onnx": 90_000_000, "model.int8.onnx": 23_000_000},
                    "difference": {"float32": 2e-6, "int8": 0.1},
                }
            }
        },
        "students": ["student"],
        "recipe": "tiny", "seeds": [0, 1, 2], "rows": rows, "notes": ["SST-2 dev: 2 rows"],
        "latency_setting": {
            "texts": "SST-2 dev", "sentences": 872, "threads": 1, "processor": "Abacus 9", "gpus": [],
            "price_per_hour": 0.1, "watts": None,
        },
        "details": {name: details(name) for name in rows},
        "disagreements": {"student": {"SST-2": [disagreement()]}},
        "curves": {"student": {"loss": [[1, 3.0], [2, 2.0]]}},
    }  # fmt: skip


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


def family_rows() -> dict[str, dict[str, Any]]:
    """Two students of two shapes and one whose shape is the first one's."""
    return {
        "teacher": row(0.4, 0.9, 22_000_000),
        "half": row(0.3, 0.9, 17_000_000, "undistilled half"),
        "tiny": row(0.2, 0.8, 5_000_000, "undistilled tiny"),
        "other": row(0.36, 0.9, 17_000_000, "undistilled half"),
        "undistilled half": row(0.0, 0.88, 17_000_000),
        "undistilled tiny": row(0.1, 0.7, 5_000_000),
    }


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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots return the figure instead of its bytes."""
    monkeypatch.setattr(plots, "_png", lambda figure: figure)


def whiskers(axes: Axes) -> list[list[float]]:
    """Low and high end of every interval drawn, in the order of drawing."""
    lines = [one for one in axes.collections if isinstance(one, LineCollection)]
    return [[float(y) for _, y in segment] for one in lines for segment in one.get_segments()]


@pytest.mark.usefixtures("drawn")
def test_retention_is_drawn_with_its_intervals(content: dict[str, Any]) -> None:
    axes = plots.retention(content).axes[0]  # type: ignore[attr-defined]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([75, 100, 100 * 60 / 65, 0, 100 * 88 / 90, 100 * 44 / 65])
    ends = content["rows"]["student"]["intervals"]["retention_by_task"]["CoLA"]
    found = whiskers(axes)
    assert found[0] == pytest.approx([100 * ends["low"], 100 * ends["high"]])
    assert len(found) == 6
    assert [text.get_text() for text in axes.get_xticklabels()] == ["CoLA", "SST-2", "macro"]


@pytest.mark.usefixtures("drawn")
def test_a_retention_without_interval_is_drawn_alone(content: dict[str, Any]) -> None:
    content["rows"]["student"]["intervals"]["retention_by_task"]["CoLA"] = None
    low, high = whiskers(plots.retention(content).axes[0])[0]  # type: ignore[attr-defined]
    assert low == high == pytest.approx(75)


@pytest.mark.usefixtures("drawn")
def test_scores_are_drawn_with_their_intervals(content: dict[str, Any]) -> None:
    axes = plots.score_against_latency(content).axes[0]  # type: ignore[attr-defined]
    discs = [
        np.asarray(one.get_offsets())[0].tolist()
        for one in axes.collections
        if isinstance(one, PathCollection)
    ]
    assert discs == [[2.0, pytest.approx(100 * value)] for value in (0.65, 0.6, 0.44)]
    for (low, high), one in zip(whiskers(axes), content["rows"].values(), strict=True):
        ends = one["intervals"]["macro"]
        assert (low, high) == (pytest.approx(100 * ends["low"]), pytest.approx(100 * ends["high"]))
        assert axes.get_ylim()[0] < low < high < axes.get_ylim()[1]


@pytest.mark.usefixtures("drawn")
def test_labels_of_close_models_do_not_cover_each_other(content: dict[str, Any]) -> None:
    rows = family_rows()
    for number, each in enumerate(rows.values()):
        each["macro"] = 0.5 + 0.01 * number
    compare(rows)
    family = content | {"rows": rows, "students": ["half", "tiny", "other"]}
    axes = plots.score_against_latency(family).axes[0]  # type: ignore[attr-defined]
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert len(labels) == len(rows)
    for one, other in itertools.combinations(labels, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent())
    assert min(label.xyann[1] for label in labels) == 0


@pytest.mark.usefixtures("drawn")
def test_rows_of_one_student_have_one_colour(content: dict[str, Any]) -> None:
    rows = family_rows() | {"tiny (D)": row(0.25, 0.85, 5_000_000, "undistilled tiny")}
    students = {"half": "half", "undistilled half": "half", "other": "other"}
    for name, one in rows.items():
        one["student"] = None if name == "teacher" else students.get(name, "tiny")
    compare(rows)
    family = content | {"rows": rows, "students": ["half", "tiny", "other"]}
    axes = plots.retention(family).axes[0]  # type: ignore[attr-defined]
    looks = {
        bars.get_label(): (
            *bars.patches[0].get_facecolor()[:3],
            bars.patches[0].get_alpha(),
            bars.patches[0].get_hatch(),
        )
        for bars in axes.containers
        if hasattr(bars, "patches")
    }
    colours = {name: found[:3] for name, found in looks.items()}
    assert colours["tiny"] == colours["tiny (D)"] == colours["undistilled tiny"]
    assert len(set(colours.values())) == 3
    assert looks["tiny"][3:] == (None, None)
    assert looks["tiny (D)"][3:] == (None, "///")
    assert looks["undistilled tiny"][3:] == (0.4, None)
    assert plots.score_against_latency(family).axes[0].collections  # type: ignore[attr-defined]


@pytest.mark.usefixtures("drawn")
def test_every_student_has_a_curve_of_each_term(content: dict[str, Any]) -> None:
    histories = {
        "half": report_content.curve(
            [{"step": 1, "loss": 3.0, "relation": 0.0}, {"step": 2, "loss": 2.0, "relation": 0.0}]
        ),
        "tiny": report_content.curve([{"step": 1, "loss": 1.0, "relation": 1.0, "kl": 0.0}]),
    }
    panels = plots.loss_curves(histories).axes  # type: ignore[union-attr]
    assert [axes.get_title() for axes in panels] == ["training loss", "relations"]  # a term at 0 is not drawn
    drawn = [[(line.get_label(), list(line.get_ydata())) for line in axes.lines] for axes in panels]
    assert drawn == [[("half", [3.0, 2.0]), ("tiny", [1.0])], [("tiny", [1.0])]]


def test_plots_are_images(content: dict[str, Any]) -> None:
    history: list[dict[str, Any]] = [
        {"step": 10, "loss": 2.0, "kl": 1.0},
        {"step": 20, "loss": 1.0, "kl": 0.5},
        {"event": "resumed"},
    ]
    curves = plots.loss_curves({"student": report_content.curve(history)})
    images = [plots.retention(content), plots.score_against_latency(content), curves]
    for image in images:
        assert image is not None
        assert image.startswith(PNG)
    assert plots.loss_curves({"student": report_content.curve([])}) is None


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
    import re

    content["rows"]["student (D)"] = content["rows"]["student"]
    content["latency_rows"]["ELMo-size (random weights)"] = content["latency_rows"]["student ONNX int8"]
    found = numbers(content)
    assert found["student D/CoLA/matthews"] == 0.3
    assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in found)
