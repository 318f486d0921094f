"""Drawings of the page as SVG text: intervals, the front of score against cost, curves of the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4c566a", "#8c6d31")
"""Colour-blind safe (Okabe and Ito), then a grey and a brown."""
LOSS_TERMS = {
    "loss": "training loss", "kl": "KL to the teacher", "mlm": "masked LM", "cosine": "cosine",
    "relation": "relations", "embedding": "vectors of texts",
}  # fmt: skip
"""Columns of a student's history that are terms of its loss -> what a curve is called."""
WIDTH, HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 44


@dataclass(frozen=True)
class Point:
    """A model in a plane: cost (less is better) against score (more is better) with its interval."""

    name: str
    cost: float
    score: float
    low: float
    high: float


def interval(value: float, low: float, high: float, least: float, most: float) -> str:
    """A dot with its interval as a line, on a scale from ``least`` to ``most``."""
    span = (most - least) or 1.0
    x, left, right = (100 * (min(max(one, least), most) - least) / span for one in (value, low, high))
    return (
        f'<svg class="interval" viewBox="-3 0 106 10" role="img" aria-label="{low:.1f} to {high:.1f}">'
        f'<line x1="{left:.2f}" x2="{right:.2f}" y1="5" y2="5"/><circle cx="{x:.2f}" cy="5" r="2.6"/></svg>'
    )


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in cost without a lower score, cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, -one.score)):
        if not best or point.score > best[-1].score:
            best.append(point)
    return best


def scatter(points: Sequence[Point], colours: Mapping[str, str], title: str) -> str:
    """Score in percent against cost on a logarithmic axis, with intervals and the front as a stepped line."""
    costs = [math.log10(max(point.cost, 1e-9)) for point in points]
    ends = [end for point in points for end in (point.low, point.high)]
    x = _Scale(min(costs) - 0.08, max(costs) + 0.08, _LEFT, WIDTH - _RIGHT)
    room = max(1.0, 0.08 * (max(ends) - min(ends)))
    y = _Scale(min(ends) - room, max(ends) + room, HEIGHT - _BOTTOM, _TOP)
    steps = [(x(math.log10(max(one.cost, 1e-9))), y(one.score)) for one in front(points)]
    path = f"M{steps[0][0]:.1f},{steps[0][1]:.1f}"
    path += "".join(f"H{right:.1f}V{up:.1f}" for right, up in steps[1:]) + f"H{WIDTH - _RIGHT}"
    parts = [_axes(y, title), f'<path class="front" d="{path}"/>']
    for cost in _nice_costs(min(point.cost for point in points), max(point.cost for point in points)):
        place = x(math.log10(cost))
        parts.append(
            f'<text class="tick" x="{place:.1f}" y="{HEIGHT - 26}" text-anchor="middle">{cost:.3g}</text>'
        )
    for point, cost in zip(points, costs, strict=True):
        place, colour = x(cost), colours[point.name]
        parts.append(
            f'<g fill="{colour}" stroke="{colour}"><title>{escape(point.name)}: {point.score:.1f} '
            f"[{point.low:.1f}, {point.high:.1f}] at {point.cost:.4g}</title>"
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{y(point.low):.1f}" y2="{y(point.high):.1f}"/>'
            f'<circle cx="{place:.1f}" cy="{y(point.score):.1f}" r="6"/></g>'
        )
    return _figure("".join(parts), title)


def curves(lines: Mapping[str, Sequence[Sequence[float]]], colours: Mapping[str, str], title: str) -> str:
    """A line a student through its [step, value] points."""
    points = [point for line in lines.values() for point in line]
    x = _Scale(min(point[0] for point in points), max(point[0] for point in points), _LEFT, WIDTH - _RIGHT)
    values = [point[1] for point in points]
    y = _Scale(min(values), max(values), HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(y, "step"), f'<text class="tick" x="{_LEFT}" y="{HEIGHT - 26}">{x.low:g}</text>']
    parts.append(
        f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 26}" text-anchor="end">{x.high:g}</text>'
    )
    for name, line in lines.items():
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        parts.append(
            f'<polyline points="{path}" stroke="{colours[name]}"><title>{escape(name)}</title></polyline>'
        )
    return _figure("".join(parts), title)


def legend(colours: Mapping[str, str]) -> str:
    """The names beside their colours."""
    entries = "".join(
        f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in colours.items()
    )
    return f'<ul class="legend">{entries}</ul>'


class _Scale:
    """A number between ``low`` and ``high`` as a place between two others."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)


def _axes(y: _Scale, title: str) -> str:
    """Horizontal lines with their numbers, and the title of the other axis."""
    step = _nice((y.high - y.low) / 4)
    parts = []
    value = math.ceil(y.low / step) * step
    while value <= y.high:
        place = y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
        value += step
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="title" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(title)}</text>'
    )
    return "".join(parts)


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, ... that is not below ``step``."""
    if step <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(step))
    return float(next(one * power for one in (1, 2, 5, 10) if one * power >= step * (1 - 1e-9)))


def _nice_costs(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis, two to eight of them, or the ends."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for heads in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        found = [one * 10.0**power for power in powers for one in heads]
        found = [one for one in found if 0.84 * low <= one <= 1.19 * high]
        if len(found) >= 2:
            return found[:8]
    return sorted({low, high})


def _figure(content: str, title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{content}</svg>"
    )
