"""Draws the plots of a report as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402

from evaluation.report.charts import LOSS_TERMS, PALETTE  # noqa: E402

COLOURS = {"teacher": "#4c566a", "student": "#0072b2", "undistilled": "#d55e00"}
OTHER_COLOURS = (*PALETTE[2:6], *PALETTE[:2])
"""Colours of rows that ``COLOURS`` does not name."""
LARGEST_DISC = 1200
"""Square of the diameter of the largest model's disc, in points."""
ERROR_BARS: dict[str, Any] = {"elinewidth": 1, "capsize": 3, "ecolor": "0.25"}
"""Matplotlib's settings of the error bars that show intervals."""


def colour(name: str, position: int) -> str:
    """Returns the colour of the row ``name``; ``position`` is the row's number among those drawn."""
    return COLOURS.get(name, OTHER_COLOURS[position % len(OTHER_COLOURS)])


def style(report: Mapping[str, Any], name: str, position: int) -> dict[str, Any]:
    """Returns Matplotlib's settings for the bars or the disc of a row.

    Each of several students has a colour. Its undistilled reference is pale, its second distillation hatched.
    """
    students, student = report["students"], report["rows"][name].get("student")
    if student is None or len(students) < 2:
        return {"color": colour(name, position)}
    student_style = {"color": colour(student, students.index(student))}
    if name == student:
        return student_style
    if name == f"{student} (D)":
        return {**student_style, "hatch": "///", "edgecolor": "white"}
    return {**student_style, "alpha": 0.4}


def retention(report: Mapping[str, Any]) -> bytes:
    """Draws the retention of each row, in percent, with 95 % intervals: one group of bars per task."""
    rows = {name: row for name, row in report["rows"].items() if name != "teacher"}
    tasks = list(report["rows"]["teacher"]["scores"])
    labels = [*tasks, "macro"]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.3 * len(labels) + 2), 4.2))
    width = 0.8 / max(1, len(rows))
    for position, (name, row) in enumerate(rows.items()):
        values = [row["retention_by_task"][task] for task in tasks] + [row["retention"]]
        ends = row["intervals"]
        intervals = [ends["retention_by_task"][task] for task in tasks] + [ends["retention"]]
        heights = [np.nan if value is None else 100 * value for value in values]
        x = np.arange(len(labels)) + (position - (len(rows) - 1) / 2) * width
        bars = axes.bar(
            x, heights, width * 0.92, label=name, **style(report, name, position),
            yerr=_error_lengths(heights, intervals), error_kw=ERROR_BARS,
        )  # fmt: skip
        texts = ["" if np.isnan(height) else f"{height:.0f}" for height in heights]
        halo = [withStroke(linewidth=3, foreground="white")]  # the teacher's line stays behind the numbers
        axes.bar_label(bars, labels=texts, padding=2, fontsize=8, path_effects=halo, zorder=5)
    axes.axhline(100, color=COLOURS["teacher"], linewidth=1, linestyle="--", label="teacher")
    axes.axvline(len(tasks) - 0.5, color="0.85", linewidth=1)
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set_ylabel("score / teacher's score, %")
    axes.set_title("Retention per task, with 95 % intervals")
    axes.margins(y=0.12)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return _png(figure)


def _error_lengths(percents: Sequence[float], intervals: Sequence[Mapping[str, float] | None]) -> np.ndarray:
    """Returns the lengths of error bars below and above each value, [2, n]; 0 for one without an interval."""
    unknown = {"low": np.nan, "high": np.nan}
    bounds = np.asarray([[100 * (one or unknown)[end] for one in intervals] for end in ("low", "high")])
    return np.nan_to_num(np.abs(bounds - np.asarray(percents)))


def score_against_latency(report: Mapping[str, Any]) -> bytes:
    """Draws macro score with its 95 % interval against median latency, as one disc per row of the report."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4))
    rows = report["rows"]
    largest = max(_megabytes(row) for row in rows.values())
    for position, (name, row) in enumerate(rows.items()):
        x, y = row["latency"]["p50_ms"], 100 * row["macro"]
        disc = {"alpha": 0.75, "linewidths": 0} | style(report, name, position)
        axes.scatter(x, y, s=LARGEST_DISC * _megabytes(row) / largest, **disc)
        axes.errorbar(x, y, yerr=_error_lengths([y], [row["intervals"]["macro"]]), fmt="none", **ERROR_BARS)
    axes.set_xlabel("median latency, ms (batch size 1, CPU)")
    axes.set_ylabel("macro score, %")
    axes.set_title("Score against latency; the area of a disc is the size in float32")
    axes.set_xlim(0, 1.45 * max(row["latency"]["p50_ms"] for row in rows.values()))
    bounds = [100 * bound for row in rows.values() for bound in row["intervals"]["macro"].values()]
    margin = max(2.0, 0.15 * (max(bounds) - min(bounds)))
    axes.set_ylim(min(bounds) - margin, max(bounds) + margin)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    _label_discs(figure, axes, rows)
    return _png(figure)


def _label_discs(figure: Figure, axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes name and size of each model beside its disc; a label that would cover another label or disc is
    moved up."""
    labels = [
        axes.annotate(
            f"{name}\n{row['parameters'] / 1e6:.2f} M, {_megabytes(row):.1f} MB",
            (row["latency"]["p50_ms"], 100 * row["macro"]),
            xytext=(24, 0), textcoords="offset points", va="center", fontsize=9,
        )
        for name, row in sorted(rows.items(), key=lambda item: item[1]["macro"])
    ]  # fmt: skip
    figure.draw_without_rendering()
    boxes = _disc_boxes(figure, axes, rows)  # and then of the labels in their final positions
    for label in labels:
        while overlaps := [box for box in boxes if box.overlaps(label.get_window_extent())]:
            pixels = max(box.y1 for box in overlaps) - label.get_window_extent().y0 + 1
            x, y = label.xyann
            label.xyann = (x, y + pixels * 72 / figure.dpi)  # in points
        boxes.append(label.get_window_extent())


def _disc_boxes(figure: Figure, axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> list[Bbox]:
    """Returns the bounding boxes of all discs, in pixels."""
    largest = max(_megabytes(row) for row in rows.values())
    boxes = []
    for row in rows.values():
        x, y = axes.transData.transform((row["latency"]["p50_ms"], 100 * row["macro"]))
        radius = math.sqrt(LARGEST_DISC * _megabytes(row) / largest) / 2 * figure.dpi / 72
        boxes.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
    return boxes


def _megabytes(row: Mapping[str, Any]) -> float:
    """Returns the size of a row's weights in float32, whatever type they are stored in."""
    return float(row["parameters"]) * 4 / 1e6


def loss_curves(histories: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> bytes | None:
    """Draws one panel per loss term and one curve per student; None if no student has curves."""
    recorded = [term for curves in histories.values() for term in curves]
    terms = {term: title for term, title in LOSS_TERMS.items() if term in recorded}
    if not terms:
        return None
    figure, panels = pyplot.subplots(
        1, len(terms), figsize=(3.4 * len(terms), 3.2), squeeze=False, layout="constrained"
    )
    for axes, (term, title) in zip(panels[0], terms.items(), strict=True):
        for position, (name, curves) in enumerate(histories.items()):
            if term in curves:
                steps, values = zip(*curves[term], strict=True)
                axes.plot(steps, values, color=colour(name, position), linewidth=1.4, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(color="0.92")
    panels[0, 0].set_ylabel("loss")
    if len(histories) > 1:
        panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle("Training losses" if len(histories) > 1 else "The student's training losses")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file and closes it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()
