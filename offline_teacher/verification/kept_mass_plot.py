"""Draws the plot of ``inspect --plot``: probability of the teacher's k most likely tokens over k."""

from __future__ import annotations

import io

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (imported after the backend is chosen)

from infra.errors import UserError  # noqa: E402
from offline_teacher.verification.sample_view import TaskView  # noqa: E402

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SAMPLES = 64
"""Largest number of the task's samples that are read, evenly spaced."""
POSITIONS = 256
"""Largest number of positions of these samples that the mean is taken over, evenly spaced."""


def plot_kept_mass(view: TaskView) -> bytes:
    """Plots the mean probability, at T = 1, of the k most likely tokens over k. Returns the bytes of a PNG.

    The mean is over masked positions of the task, or over all positions if nothing is masked. One k is the
    store's ``top_k``. Raises UserError if the store holds no distributions over tokens.
    """
    layout, task = view.store.layout, view.task
    if layout.positions == "pooled" or not view.has_token_distributions:
        raise UserError(
            f"--plot: {view.store.root} holds no distributions over tokens, so there is nothing to plot;"
            " leave --plot out"
        )
    columns = view.columns(np.unique(np.linspace(0, task.samples - 1, SAMPLES).astype(np.int64)))
    if layout.masked and layout.positions == "all":
        rows, masked = np.nonzero(columns["masked_positions"] >= 0)
        slots = columns["masked_positions"][rows, masked].astype(np.int64)
    else:
        rows, slots = np.nonzero(layout.used_slots(columns))
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), POSITIONS)).astype(np.int64)
    predicted = view.distributions(columns, rows[chosen], slots[chosen])
    ks = sorted({k for k in (*KS, layout.top_k) if 0 < k <= predicted.ids.shape[1]})
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(ks, [1 - predicted.tail(k).mean() for k in ks], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="k", ylabel="share of the teacher's probability at T = 1", ylim=(0, 1.02))
    axes.grid(color="0.92")
    axes.set_title(f"{len(chosen)} {'masked ' if layout.masked else ''}positions of task {task.name}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()
