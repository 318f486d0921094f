"""Draws the plots of ``plan`` from its report (``plan.json``) and returns them as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (imported after the backend is chosen)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

from offline_teacher.planning.report import amount, two_digits  # noqa: E402

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4c566a", "#f0e442")
"""The colour-blind safe palette of Okabe and Ito."""
WHITE_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
"""Background of a bar's label, which hides the grid lines behind the label."""
TEXT_COLUMNS = ("digests", "sequence_id", "token_count", "input_ids", "masked_positions", "masked_labels")


def plot_kept_mass(report: dict[str, Any]) -> bytes:
    """Plots the mean probability of the k most likely tokens over k, with one line per temperature.

    The left panel is for masked positions, the right panel for unmasked positions.
    """
    mass = report["kept_mass"]
    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.2), sharey=True, layout="constrained")
    for axes, kind in zip(panels, ("masked", "unmasked"), strict=True):
        for number, (temperature, values) in enumerate(zip(mass["temperatures"], mass[kind], strict=True)):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(mass["ks"], values, marker="o", color=colour, label=f"{temperature:g}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(mass["ks"], [str(k) for k in mass["ks"]])
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(f"{kind} positions ({mass['positions'][kind]:,})", fontsize=10)
        axes.set_xlabel("k")
    panels[0].set_ylabel("share of the teacher's probability")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, title="T", frameon=False, loc="outside right center")
    figure.suptitle("Mean probability of the teacher's k most likely tokens")
    return _png(figure)


def plot_gradient_error(report: dict[str, Any]) -> bytes:
    """Plots the gradient error of each soft target as two horizontal bars on a log axis.

    One bar is for a student before its first step, the other for a student close to the teacher.
    """
    errors = report["gradient_error"]
    names = list(errors["at_initialisation"])
    figure, axes = pyplot.subplots(figsize=(9.2, 0.75 * len(names) + 1.6), layout="constrained")
    students = {"at initialisation": "at_initialisation", "close to the teacher": "close_to_teacher"}
    centres, height = np.arange(len(names)), 0.36
    values = [value for key in students.values() for value in errors[key].values() if value is not None]
    if not values:
        message = "nothing to compare:\nthe exact gradient is zero"
        axes.text(0.5, 0.5, message, ha="center", transform=axes.transAxes)
        values = [1.0]
    low, high = 10 ** np.floor(np.log10(max(min(values), 1e-8))) / 2, max(max(values) * 6, 3.0)
    for number, (label, key) in enumerate(students.items()):
        widths = [max(value or 0.0, low) for value in errors[key].values()]
        offset = (number - 0.5) * height
        bars = axes.barh(centres + offset, widths, height * 0.92, color=COLOURS[number], label=label)
        axes.bar_label(bars, [two_digits(value) for value in errors[key].values()], padding=3, bbox=WHITE_BOX)
    axes.axvline(1.0, color="0.35", linestyle="--", label="no gradient")
    axes.set(xscale="log", xlim=(low, high))
    axes.set_yticks(centres, names)
    axes.invert_yaxis()
    axes.set_xlabel("relative error against the gradient from the teacher's full distribution")
    axes.set_title(f"Gradient error of each soft target at T = {errors['temperature']:g}", pad=18)
    figure.legend(frameon=False, title="student", loc="outside right center")
    return _png(figure)


def plot_bytes_per_token(report: dict[str, Any]) -> bytes:
    """Plots the bytes per token of each form of store as one bar, stacked from its columns."""
    forms = report["bytes"]
    names = list(forms)
    stacks: dict[str, tuple[str, ...]] = {"ids, masks, digests": TEXT_COLUMNS}
    teacher = ("topk_ids", "topk_logits", "logsumexp", "hidden_states", "hidden_scale", "embedding")
    stacks |= {name: (name,) for name in teacher}
    figure, axes = pyplot.subplots(figsize=(9.2, 0.55 * len(names) + 1.6), layout="constrained")
    left = np.zeros(len(names))
    for number, (label, columns) in enumerate(stacks.items()):
        sizes = [[forms[name]["columns"].get(column, 0.0) for column in columns] for name in names]
        widths = np.array(sizes).sum(axis=1)
        if widths.any():
            axes.barh(names, widths, 0.66, left=left, color=COLOURS[(number + 6) % len(COLOURS)], label=label)
        left += widths
    for name, total in zip(names, left, strict=True):
        axes.text(total, name, f"  {total:,.0f}  ({amount(forms[name]['total'], 'bytes')})", va="center")
    axes.set_xlim(0, left.max() * 1.25)
    axes.invert_yaxis()
    axes.set_xlabel("bytes per token (in brackets: all masking epochs of the corpus)")
    axes.set_title("Size of the store by column")
    figure.legend(frameon=False, loc="outside right center")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if axes.yaxis_inverted() else "both", color="0.92")
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    pyplot.close(figure)
    return buffer.getvalue()


PLOTS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "kept_mass.png": plot_kept_mass,
    "gradient_error.png": plot_gradient_error,
    "bytes_per_token.png": plot_bytes_per_token,
}
"""File name -> function that draws the plot."""


def can_draw(name: str, report: dict[str, Any]) -> bool:
    """Whether the report has the numbers of the plot ``name``."""
    return name == "bytes_per_token.png" or report[name.removesuffix(".png")] is not None
