"""A report's plots, by what they draw."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.text import Annotation

from evaluation.report import plots
from evaluation.report.content import curve
from tests.evaluation.report_content import PNG, compare, family_rows, row


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
def test_a_label_covers_no_disc_of_another_model(content: dict[str, Any]) -> None:
    """The second model's disc is where the first one's label would be."""
    rows = family_rows()
    for number, each in enumerate(rows.values()):
        each["macro"], each["latency"]["p50_ms"] = 0.5 + 0.1 * (number // 2), 2.0 + 0.5 * (number % 2)
    compare(rows)
    family = content | {"rows": rows, "students": ["half", "tiny", "other"]}
    axes = plots.score_against_latency(family).axes[0]  # type: ignore[attr-defined]
    axes.figure.draw_without_rendering()
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    discs = [one for one in axes.collections if isinstance(one, PathCollection)]
    moved = [label for label in labels if label.xyann[1] > 0]
    assert moved
    for label, disc in itertools.product(labels, discs):
        (x, y), box = axes.transData.transform(np.asarray(disc.get_offsets())[0]), label.get_window_extent()
        nearest = np.clip([x, y], [box.x0, box.y0], [box.x1, box.y1])
        diameter = np.sqrt(disc.get_sizes()[0]) * axes.figure.dpi / 72
        assert np.hypot(*(nearest - (x, y))) >= diameter / 2


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
        "half": curve([{"step": 1, "loss": 3.0, "relation": 0.0}, {"step": 2, "loss": 2.0, "relation": 0.0}]),
        "tiny": curve([{"step": 1, "loss": 1.0, "relation": 1.0, "kl": 0.0}]),
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
    curves = plots.loss_curves({"student": curve(history)})
    images = [plots.retention(content), plots.score_against_latency(content), curves]
    for image in images:
        assert image is not None
        assert image.startswith(PNG)
    assert plots.loss_curves({"student": curve([])}) is None
