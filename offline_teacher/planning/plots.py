"""The plots of ``plan`` as PNG bytes, drawn from its report."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

from offline_teacher.planning.report import amount, figure  # noqa: E402

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4c566a", "#f0e442")
"""Colour-blind safe (Okabe and Ito)."""
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
TEXT_COLUMNS = ("digests", "sequence_id", "token_count", "input_ids", "masked_positions", "masked_labels")


def kept_mass(report: dict[str, Any]) -> bytes:
    """Probability kept over k, a line a temperature; masked and unmasked positions."""
    mass = report["kept_mass"]
    chart, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.2), sharey=True, layout="constrained")
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
    panels[0].set_ylabel("teacher's probability kept")
    chart.legend(*panels[0].get_legend_handles_labels(), title="T", frameon=False, loc="outside right center")
    chart.suptitle("Mean probability kept by the k most likely tokens")
    return _png(chart)


def gradient_error(report: dict[str, Any]) -> bytes:
    """Bars, on a log axis: each soft target's error for a student at the start and one near the teacher."""
    errors = report["gradient_error"]
    names = list(errors["at_initialisation"])
    chart, axes = pyplot.subplots(figsize=(9.2, 0.75 * len(names) + 1.6), layout="constrained")
    kinds = {"at initialisation": "at_initialisation", "close to the teacher": "close_to_teacher"}
    places, height = np.arange(len(names)), 0.36
    values = [value for key in kinds.values() for value in errors[key].values() if value is not None]
    if not values:
        nothing = "nothing to compare:\nthe dense gradient is zero"
        axes.text(0.5, 0.5, nothing, ha="center", transform=axes.transAxes)
        values = [1.0]
    low, high = 10 ** np.floor(np.log10(max(min(values), 1e-8))) / 2, max(max(values) * 6, 3.0)
    for number, (label, key) in enumerate(kinds.items()):
        widths = [max(value or 0.0, low) for value in errors[key].values()]
        at = places + (number - 0.5) * height
        bars = axes.barh(at, widths, height * 0.92, color=COLOURS[number], label=label)
        axes.bar_label(bars, [figure(value) for value in errors[key].values()], padding=3, bbox=WHITE)
    axes.axvline(1.0, color="0.35", linestyle="--", label="no gradient")
    axes.set(xscale="log", xlim=(low, high))
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("relative error of the gradient against the dense teacher (log)")
    axes.set_title(f"Gradient error of each soft target at T = {errors['temperature']:g}", pad=18)
    chart.legend(frameon=False, title="student", loc="outside right center")
    return _png(chart)


def bytes_per_token(report: dict[str, Any]) -> bytes:
    """Stacked bars by column, a bar a form of store."""
    forms = report["bytes"]
    names = list(forms)
    stacks: dict[str, tuple[str, ...]] = {"ids, masks, digests": TEXT_COLUMNS}
    own = ("topk_ids", "topk_logits", "logsumexp", "hidden_states", "hidden_scale", "embedding")
    stacks |= {name: (name,) for name in own}
    chart, axes = pyplot.subplots(figsize=(9.2, 0.55 * len(names) + 1.6), layout="constrained")
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
    axes.set_xlabel("bytes a token (in brackets: whole corpus, all masking epochs)")
    axes.set_title("Size of the store by column")
    chart.legend(frameon=False, loc="outside right center")
    return _png(chart)


def _png(chart: Figure) -> bytes:
    for axes in chart.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if axes.yaxis_inverted() else "both", color="0.92")
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    chart.savefig(buffer, format="png", dpi=144)
    pyplot.close(chart)
    return buffer.getvalue()


PLOTS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "kept_mass.png": kept_mass,
    "gradient_error.png": gradient_error,
    "bytes_per_token.png": bytes_per_token,
}


def can_draw(name: str, report: dict[str, Any]) -> bool:
    """Whether the report holds what a plot is of."""
    return name == "bytes_per_token.png" or report[name.removesuffix(".png")] is not None
