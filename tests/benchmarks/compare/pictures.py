"""Pictures of the page of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tests.benchmarks.compare.curve import START, TEACHER, Point

Panel = tuple[str, Mapping[str, Sequence[float]]]
"""The text at the axis of a panel, and its values: arm -> one value per run."""


def draw_arms(names: Sequence[str], panels: Sequence[Panel], path: Path) -> list[str]:
    """Plots one point per run and one row per arm, with a panel per measure. Leaves out panels with values
    of fewer than two arms, and then arms without a value in any remaining panel. Returns the texts at the
    axes of the panels that are drawn; writes nothing if there is none."""
    panels = [(title, values) for title, values in panels if sum(map(bool, values.values())) > 1]
    names = [name for name in names if any(values.get(name) for _, values in panels)]
    if not panels:
        return []
    figure = Figure(figsize=(3.5 + 4 * len(panels), 0.9 + 0.3 * len(names)), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, values) in zip(row, panels, strict=True):
        for place, name in enumerate(names):
            own = values.get(name, [])
            axes.plot(own, [place] * len(own), "o", color="tab:blue", alpha=0.6)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)  # from above, and no point is cut off at an edge
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return [title for title, _ in panels]


def draw_curve(points: Mapping[str, Point], path: Path) -> bool:
    """Plots the score of every task, and their mean, against the number of tokens. Horizontal lines are the
    teacher and the untrained student. Returns whether there was a trained student to draw."""
    trained = sorted((point for point in points.values() if point.tokens), key=lambda point: point.tokens)
    if not trained:
        return False
    tasks = list(trained[0].scores)
    figure = Figure(figsize=(2.8 * len(tasks), 3), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        tokens = [point.tokens / 1e6 for point in trained]
        axes.plot(tokens, [point.scores[task] for point in trained], "o-")
        for name, colour in ((TEACHER, "tab:green"), (START, "tab:gray")):
            if name in points:
                axes.axhline(points[name].scores[task], color=colour, linestyle="--", label=name)
        axes.set_title(task)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{number:.0f}" for number in tokens])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("million tokens")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True
