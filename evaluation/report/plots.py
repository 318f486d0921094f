"""The report's plots as PNG bytes."""

from __future__ import annotations

import io
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
OTHERS = (*PALETTE[2:6], *PALETTE[:2])
WHISKERS: dict[str, Any] = {"elinewidth": 1, "capsize": 3, "ecolor": "0.25"}
"""How intervals are drawn."""


def colour(name: str, position: int) -> str:
    return COLOURS.get(name, OTHERS[position % len(OTHERS)])


def look(report: Mapping[str, Any], name: str, position: int) -> dict[str, Any]:
    """How a row is drawn: of several students all rows of one have its colour.

    The undistilled one is pale, the one after a second distillation is hatched.
    """
    students, student = report["students"], report["rows"][name].get("student")
    if student is None or len(students) < 2:
        return {"color": colour(name, position)}
    own = {"color": colour(student, students.index(student))}
    if name == student:
        return own
    return (
        {**own, "hatch": "///", "edgecolor": "white"} if name == f"{student} (D)" else {**own, "alpha": 0.4}
    )


def retention(report: Mapping[str, Any]) -> bytes:
    """Bars a task: each row's score relative to the teacher's, percent, with 95 % intervals."""
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
        places = np.arange(len(labels)) + (position - (len(rows) - 1) / 2) * width
        bars = axes.bar(
            places, heights, width * 0.92, label=name, **look(report, name, position),
            yerr=_whiskers(heights, intervals), error_kw=WHISKERS,
        )  # fmt: skip
        texts = ["" if np.isnan(height) else f"{height:.0f}" for height in heights]
        halo = [withStroke(linewidth=3, foreground="white")]  # the teacher's line stays behind the numbers
        axes.bar_label(bars, labels=texts, padding=2, fontsize=8, path_effects=halo, zorder=5)
    axes.axhline(100, color=COLOURS["teacher"], linewidth=1, linestyle="--", label="teacher")
    axes.axvline(len(tasks) - 0.5, color="0.85", linewidth=1)
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set_ylabel("score kept, % of the teacher's")
    axes.set_title("Retention per task, with 95 % intervals")
    axes.margins(y=0.12)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return _png(figure)


def _whiskers(heights: Sequence[float], intervals: Sequence[Mapping[str, float] | None]) -> np.ndarray:
    """Percent below and above each height, [2, n]; none for a value without an interval."""
    nothing = {"low": np.nan, "high": np.nan}
    ends = np.asarray([[100 * (one or nothing)[side] for one in intervals] for side in ("low", "high")])
    return np.nan_to_num(np.abs(ends - np.asarray(heights)))


def score_against_latency(report: Mapping[str, Any]) -> bytes:
    """A disc a model: median latency, macro score with its 95 % interval, area by size."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4))
    rows = report["rows"]
    largest = max(_megabytes(row) for row in rows.values())
    for position, (name, row) in enumerate(rows.items()):
        x, y = row["latency"]["p50_ms"], 100 * row["macro"]
        drawn = {"alpha": 0.75, "linewidths": 0} | look(report, name, position)
        axes.scatter(x, y, s=1200 * _megabytes(row) / largest, **drawn)
        axes.errorbar(x, y, yerr=_whiskers([y], [row["intervals"]["macro"]]), fmt="none", **WHISKERS)
    axes.set_xlabel("median latency a sentence pair, ms (batch size 1, CPU)")
    axes.set_ylabel("macro score, %")
    axes.set_title("Score against latency; area: size in float32")
    axes.set_xlim(0, 1.45 * max(row["latency"]["p50_ms"] for row in rows.values()))
    ends = [100 * end for row in rows.values() for end in row["intervals"]["macro"].values()]
    room = max(2.0, 0.15 * (max(ends) - min(ends)))
    axes.set_ylim(min(ends) - room, max(ends) + room)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    _label_discs(figure, axes, rows)
    return _png(figure)


def _label_discs(figure: Figure, axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes name and size of each model beside its disc; a label moves up if it would cover another."""
    labels = [
        axes.annotate(
            f"{name}\n{row['parameters'] / 1e6:.2f} M, {_megabytes(row):.1f} MB",
            (row["latency"]["p50_ms"], 100 * row["macro"]),
            xytext=(24, 0), textcoords="offset points", va="center", fontsize=9,
        )
        for name, row in sorted(rows.items(), key=lambda item: item[1]["macro"])
    ]  # fmt: skip
    figure.draw_without_rendering()
    placed: list[Bbox] = []
    for label in labels:
        while hits := [box for box in placed if box.overlaps(label.get_window_extent())]:
            pixels = max(box.y1 for box in hits) - label.get_window_extent().y0 + 1
            x, y = label.xyann
            label.xyann = (x, y + pixels * 72 / figure.dpi)
        placed.append(label.get_window_extent())


def _megabytes(row: Mapping[str, Any]) -> float:
    """In float32, so that a teacher stored in float16 is compared like with like."""
    return float(row["parameters"]) * 4 / 1e6


def loss_curves(histories: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> bytes | None:
    """Each loss term over steps, a curve a student, from ``curves`` of the report; None without any."""
    found = [term for curves in histories.values() for term in curves]
    terms = {key: title for key, title in LOSS_TERMS.items() if key in found}
    if not terms:
        return None
    figure, panels = pyplot.subplots(
        1, len(terms), figsize=(3.4 * len(terms), 3.2), squeeze=False, layout="constrained"
    )
    for axes, (key, title) in zip(panels[0], terms.items(), strict=True):
        for position, (name, curves) in enumerate(histories.items()):
            if key in curves:
                steps, values = zip(*curves[key], strict=True)
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
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()
