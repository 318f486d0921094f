"""Plots the probability of the teacher's k most likely tokens over k, for ``inspect --plot`` and ``plan``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (imported after the backend is chosen)

from infra.errors import UserError  # noqa: E402
from offline_teacher.verification.sample_view import TaskView, evenly_spaced  # noqa: E402

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
POSITIONS = 256
"""Largest number of positions of these samples that the mean is taken over, evenly spaced."""


def plot_kept_mass(view: TaskView) -> bytes:
    """Plots the mean probability, at T = 1, of the k most likely tokens over k. Returns the bytes of a PNG.

    The mean is over masked positions of the task, or over all positions if nothing is masked. One k is the
    store's ``top_k``. Raises UserError if the store holds no distributions over tokens.
    """
    layout, task = view.store.layout, view.task
    if layout.positions == "pooled" or not view.has_token_distributions:
        what = f"{view.store.root} holds no distributions over tokens"
        raise UserError(f"--plot: {what}, so there is nothing to plot; leave --plot out")
    columns = view.columns(evenly_spaced(task))
    if layout.masked and layout.positions == "all":
        rows, masked = np.nonzero(columns["masked_positions"] >= 0)
        slots = columns["masked_positions"][rows, masked].astype(np.int64)
    else:
        rows, slots = np.nonzero(layout.used_slots(columns))
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), POSITIONS)).astype(np.int64)
    predicted = view.distributions(columns, rows[chosen], slots[chosen])
    ks = sorted({k for k in (*KS, layout.top_k) if 0 < k <= predicted.ids.shape[1]})
    title = f"{len(chosen)} {'masked ' if layout.masked else ''}positions of task {task.name}"
    return draw(ks, {title: {1.0: [1 - predicted.tail(k).mean() for k in ks]}})


def draw(ks: Sequence[int], panels: Mapping[str, Mapping[float, Sequence[float]]]) -> bytes:
    """Returns a PNG. ``panels``: title -> temperature -> probability of the k most likely tokens, by k."""
    count = len(panels)
    figure = pyplot.figure(figsize=(4.8 * count + 1.2, 4.2), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)
    for panel, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for temperature, values in lines.items():
            panel.plot(ks, values, marker="o", label=f"T = {temperature:g}")
        panel.set_xscale("log", base=2)
        panel.set_xticks(ks, [str(k) for k in ks])
        panel.set(title=title, xlabel="k", ylim=(0, 1.02))
        panel.grid(color="0.92")
    axes[0][0].set_ylabel("share of the teacher's probability")
    axes[0][0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()
