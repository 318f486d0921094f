"""The learning curve: scores against the number of tokens, extrapolated.

The extrapolation fits a power law to the distance from the teacher's score: ``gap = a * tokens**-b`` (the
form that Hestness et al. found for errors, arXiv 1712.00409), by least squares of the logarithms. It assumes
that a student with endless training reaches the teacher. A student above the teacher is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TEACHER, START, MEAN = "teacher", "start", "mean"
"""Names of the arms without training, and of the mean over tasks."""
RETAINED = (0.97, 0.99)
"""Shares of the teacher's score for which the extrapolation states the number of tokens."""
LEAST_POINTS = 4
"""Least number of trained students for an extrapolation."""


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
    header = ["", "teacher", f"{trained[-1].tokens / 1e6:.1f} M tokens", "share of the teacher's score"]
    rows = [
        header + [f"tokens for {share:.0%}" for share in RETAINED],
        ["---"] * (len(header) + len(RETAINED)),
    ]
    for task, teacher in points[TEACHER].scores.items():
        last = trained[-1].scores[task]
        known = [(point.tokens, teacher - point.scores[task]) for point in trained]
        reached = [_needed(teacher, last, share, known) for share in RETAINED]
        rows.append([task, f"{teacher:.1f}", f"{last:.1f}", f"{last / teacher:.1%}", *reached])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        "The last columns are extrapolated: a power law is fitted to the distance from the teacher's score.\n"
        "In brackets are the lowest and the highest result if one point is left out.\n\n" + lines + "\n"
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
