"""The learning curve: scores against the number of tokens, as a picture and as an extrapolation.

The extrapolation fits a power law to the distance from the teacher's score: ``gap = a * tokens**-b`` (the
form that Hestness et al. found for errors, arXiv 1712.00409), by least squares of the logarithms.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TEACHER, START, MEAN = "teacher", "start", "mean"
RETAINED = (0.97, 0.99)
"""Shares of the teacher's score for which the extrapolation states the number of tokens."""
LEAST_POINTS = 4


@dataclass(frozen=True)
class Point:
    """A model's number of training tokens, and its scores times 100 for every task and for the mean."""

    tokens: int
    scores: Mapping[str, float]


def power_law(tokens: Sequence[int], gaps: Sequence[float]) -> tuple[float, float]:
    """Returns ``(a, b)`` of the law ``gap = a * tokens**-b``. All gaps must be positive."""
    line = statistics.linear_regression([math.log(x) for x in tokens], [math.log(y) for y in gaps])
    return math.exp(line.intercept), -line.slope


def tokens_for(gap: float, points: Sequence[tuple[int, float]]) -> float:
    """Returns the number of tokens at which the law fitted to ``points``, pairs of tokens and gap, reaches
    ``gap``; infinity if the law does not fall."""
    a, b = power_law(*zip(*points, strict=True))
    return math.exp(min(math.log(a / gap) / b, 700.0)) if b > 0 else math.inf


def extrapolation(points: Mapping[str, Point]) -> str:
    """Returns a Markdown table with one row per task and one for the mean. ``points``: arm -> point, with the
    teacher. Returns an empty text for fewer than ``LEAST_POINTS`` trained students."""
    trained = sorted((point for point in points.values() if point.tokens), key=lambda point: point.tokens)
    if TEACHER not in points or len(trained) < LEAST_POINTS:
        return ""
    header = ["", "teacher", f"{trained[-1].tokens / 1e6:.1f} M tokens", "of the teacher's"]
    rows = [header + [f"{share:.0%} at" for share in RETAINED], ["---"] * (len(header) + len(RETAINED))]
    for task, teacher in points[TEACHER].scores.items():
        last = trained[-1].scores[task]
        known = [(point.tokens, teacher - point.scores[task]) for point in trained]
        reached = [_needed(teacher, last, share, known) for share in RETAINED]
        rows.append([task, f"{teacher:.1f}", f"{last:.1f}", f"{last / teacher:.1%}", *reached])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        "The last columns are extrapolated: a power law is fitted to the distance from the teacher's score.\n"
        "The range in brackets is that of the same fits without one of the points.\n\n" + lines + "\n"
    )


def _needed(teacher: float, last: float, share: float, points: Sequence[tuple[int, float]]) -> str:
    """Returns how many tokens a score of ``share * teacher`` needs, as text."""
    if last >= share * teacher:
        return "reached"
    positive = [(tokens, gap) for tokens, gap in points if gap > 0]
    if len(positive) < LEAST_POINTS:
        return ""
    gap = (1 - share) * teacher
    parts = [positive[:i] + positive[i + 1 :] for i in range(len(positive))]
    low, *_, high = sorted(tokens_for(gap, part) for part in parts)
    return f"{_millions(tokens_for(gap, positive))} ({_millions(low)} to {_millions(high)})"


def _millions(tokens: float) -> str:
    """Returns a number of tokens with two significant digits; ``never`` above a million million."""
    if tokens > 1e12:
        return "never"
    digits = max(1 - math.floor(math.log10(tokens / 1e6)), 0)
    return f"{round(tokens / 1e6, 1 - math.floor(math.log10(tokens / 1e6))):,.{digits}f} M"


def draw_curve(points: Mapping[str, Point], path: Path) -> bool:
    """Plots the score of every task, and their mean, against the number of tokens. Horizontal lines are the
    teacher and the untrained student. Returns whether there was a trained student to draw."""
    trained = sorted((point for point in points.values() if point.tokens), key=lambda point: point.tokens)
    if not trained:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

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
        axes.set_xticks([round(number, 1) for number in tokens])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("million tokens")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True
