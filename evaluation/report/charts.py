"""Draws the charts of ``report.html`` as SVG text: intervals, scores against cost, loss curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4c566a", "#8c6d31")
"""Six colours that are safe for colour-blind readers (Okabe and Ito), a grey and a brown."""
LOSS_TERMS = {
    "loss": "training loss", "kl": "KL to the teacher", "mlm": "masked LM", "cosine": "cosine",
    "relation": "relations", "embedding": "text embeddings",
}  # fmt: skip
"""Column of a student's training history that holds a loss term -> title of its chart."""
WIDTH, HEIGHT = 640, 360
"""Size of a chart in SVG units."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 44
"""Margins around the axes of a chart."""


@dataclass(frozen=True)
class Point:
    """Cost of a model, and its macro score in percent with the bounds of the 95 % interval."""

    name: str
    cost: float
    score: float
    low: float
    high: float


def interval(value: float, low: float, high: float, least: float, greatest: float) -> str:
    """Returns a drawing of [low, high] as a line and ``value`` as a dot, on an axis [least, greatest]."""
    span = (greatest - least) or 1.0
    x, left, right = (100 * (min(max(one, least), greatest) - least) / span for one in (value, low, high))
    return (
        f'<svg class="interval" viewBox="-3 0 106 10" role="img" aria-label="{low:.1f} to {high:.1f}">'
        f'<line x1="{left:.2f}" x2="{right:.2f}" y1="5" y2="5"/><circle cx="{x:.2f}" cy="5" r="2.6"/></svg>'
    )


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Returns the points that score higher than every point of equal or lower cost, the cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, -one.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def scatter(points: Sequence[Point], colours: Mapping[str, str], title: str) -> str:
    """Returns a chart of score against cost (logarithmic axis with ``title``), with the Pareto front."""
    costs = [math.log10(max(point.cost, 1e-9)) for point in points]
    bounds = [bound for point in points for bound in (point.low, point.high)]
    x = _Scale(min(costs) - 0.08, max(costs) + 0.08, _LEFT, WIDTH - _RIGHT)
    margin = max(1.0, 0.08 * (max(bounds) - min(bounds)))
    y = _Scale(min(bounds) - margin, max(bounds) + margin, HEIGHT - _BOTTOM, _TOP)
    corners = [(x(math.log10(max(one.cost, 1e-9))), y(one.score)) for one in pareto_front(points)]
    path = f"M{corners[0][0]:.1f},{corners[0][1]:.1f}"
    path += "".join(f"H{right:.1f}V{up:.1f}" for right, up in corners[1:]) + f"H{WIDTH - _RIGHT}"
    parts = [_axes(y, title), f'<path class="front" d="{path}"/>']
    for cost in _cost_ticks(min(point.cost for point in points), max(point.cost for point in points)):
        at = f'x="{x(math.log10(cost)):.1f}" y="{HEIGHT - 26}"'
        parts.append(f'<text class="tick" {at} text-anchor="middle">{cost:.3g}</text>')
    for point, cost in zip(points, costs, strict=True):
        point_x, colour = x(cost), colours[point.name]
        parts.append(
            f'<g fill="{colour}" stroke="{colour}"><title>{escape(point.name)}: {point.score:.1f} '
            f"[{point.low:.1f}, {point.high:.1f}] at {point.cost:.4g}</title>"
            f'<line x1="{point_x:.1f}" x2="{point_x:.1f}" y1="{y(point.low):.1f}" y2="{y(point.high):.1f}"/>'
            f'<circle cx="{point_x:.1f}" cy="{y(point.score):.1f}" r="6"/></g>'
        )
    return _figure("".join(parts), title)


def curves(lines: Mapping[str, Sequence[Sequence[float]]], colours: Mapping[str, str], title: str) -> str:
    """Returns a chart with one line per student; lines: student -> [step, value] points."""
    points = [point for line in lines.values() for point in line]
    x = _Scale(min(point[0] for point in points), max(point[0] for point in points), _LEFT, WIDTH - _RIGHT)
    values = [point[1] for point in points]
    y = _Scale(min(values), max(values), HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(y, "step"), f'<text class="tick" x="{_LEFT}" y="{HEIGHT - 26}">{x.low:g}</text>']
    at = f'x="{WIDTH - _RIGHT}" y="{HEIGHT - 26}"'
    parts.append(f'<text class="tick" {at} text-anchor="end">{x.high:g}</text>')
    for name, line in lines.items():
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        title_of_line = f"<title>{escape(name)}</title>"
        parts.append(f'<polyline points="{path}" stroke="{colours[name]}">{title_of_line}</polyline>')
    return _figure("".join(parts), title)


def legend(colours: Mapping[str, str]) -> str:
    """Returns a list of the names, each with a disc of its colour."""
    discs = ((name, f'<i style="background:{colour}"></i>') for name, colour in colours.items())
    entries = "".join(f"<li>{disc}{escape(name)}</li>" for name, disc in discs)
    return f'<ul class="legend">{entries}</ul>'


class _Scale:
    """Maps a value linearly, from [low, high] to a position in [start, end] of the drawing."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)


def _axes(y: _Scale, title: str) -> str:
    """Returns horizontal lines labelled with the values of ``y``, and the title of the x axis."""
    step = _round_step((y.high - y.low) / 4)
    parts = []
    value = math.ceil(y.low / step) * step
    while value <= y.high:
        line_y = y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{line_y:.1f}" y2="{line_y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{line_y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
        value += step
    at = f'x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}"'
    parts.append(f'<text class="title" {at} text-anchor="middle">{escape(title)}</text>')
    return "".join(parts)


def _round_step(step: float) -> float:
    """Returns the least number that is 1, 2 or 5 times a power of ten and not below ``step``."""
    if step <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(step))
    return float(next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9)))


def _cost_ticks(low: float, high: float) -> list[float]:
    """Returns two to eight round numbers in or near [low, high]; the bounds if there are none."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        numbers = (digit * 10.0**power for power in powers for digit in digits)
        ticks = [number for number in numbers if 0.84 * low <= number <= 1.19 * high]
        if len(ticks) >= 2:
            return ticks[:8]
    return sorted({low, high})


def _figure(content: str, title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{content}</svg>"
    )
