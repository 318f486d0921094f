"""The picture of ``inspect``: probability kept by the k most likely tokens."""

from __future__ import annotations

import io

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first)

from infra.errors import UserError  # noqa: E402
from offline_teacher.verification.sample_view import TaskView  # noqa: E402

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
POSITIONS = 256
SAMPLES = 64
"""Of the task, spread over it, from which the positions are taken."""


def kept_mass(view: TaskView) -> bytes:
    """A PNG: mean over masked positions of the task (over all where nothing is masked) at T = 1.

    The store's own K is among the k. Raises UserError if the store has no distributions over the vocabulary.
    """
    layout, task = view.store.layout, view.task
    if layout.positions == "pooled" or not view.tells_tokens:
        raise UserError(
            f"--plot: {view.store.root} holds nothing over the vocabulary, so there is no mass to plot"
        )
    columns = view.columns(np.unique(np.linspace(0, task.samples - 1, SAMPLES).astype(np.int64)))
    if layout.masked and layout.positions == "all":
        rows, masked = np.nonzero(columns["masked_positions"] >= 0)
        slots = columns["masked_positions"][rows, masked].astype(np.int64)
    else:
        rows, slots = np.nonzero(layout.used_slots(columns))
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), POSITIONS)).astype(np.int64)
    found = view.distributions(columns, rows[chosen], slots[chosen])
    ks = sorted({k for k in (*KS, layout.top_k) if 0 < k <= found.ids.shape[1]})
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(ks, [1 - found.tail(k).mean() for k in ks], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="k", ylabel="probability kept at T = 1", ylim=(0, 1.02))
    axes.grid(color="0.92")
    axes.set_title(f"{len(chosen)} {'masked ' if layout.masked else ''}positions of task {task.name}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()
