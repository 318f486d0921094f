"""The drawings of report.html: what is drawn is where the numbers say, and names are text."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.report import charts, page
from evaluation.report.charts import Point

HOSTILE = "<script>alert('x')</script>"
COSTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8)


def points(pairs: list[tuple[int, int]]) -> list[Point]:
    return [
        Point(str(place), float(cost), float(score), score - 1.0, score + 2.0)
        for place, (cost, score) in enumerate(pairs)
    ]


@given(COSTS)
def test_no_other_point_beats_one_of_the_front(pairs: list[tuple[int, int]]) -> None:
    every = points(pairs)
    best = charts.pareto_front(every)
    assert [one.cost for one in best] == sorted({one.cost for one in best})
    for one in every:
        beaten = any(
            other.cost <= one.cost
            and other.score >= one.score
            and (other.cost, other.score) != (one.cost, one.score)
            for other in every
        )
        on_front = any((one.cost, one.score) == (other.cost, other.score) for other in best)
        assert on_front is not beaten


def test_an_interval_is_where_its_numbers_are() -> None:
    drawn = ElementTree.fromstring(charts.interval(50.0, 25.0, 75.0, 0.0, 100.0))
    line, dot = drawn.find("line"), drawn.find("circle")
    assert line is not None
    assert dot is not None
    assert (line.get("x1"), line.get("x2"), dot.get("cx")) == ("25.00", "75.00", "50.00")
    clipped = ElementTree.fromstring(charts.interval(5.0, -50.0, 500.0, 0.0, 10.0)).find("line")
    assert clipped is not None
    assert (clipped.get("x1"), clipped.get("x2")) == ("0.00", "100.00")


def test_a_plane_of_score_against_cost() -> None:
    every = points([(1, 50), (100, 90), (10, 70)])
    colours = {point.name: f"#00000{point.name}" for point in every}
    drawn = ElementTree.fromstring(charts.scatter(every, colours, "ms"))
    groups = drawn.findall("g")
    assert [group.get("fill") for group in groups] == ["#000000", "#000001", "#000002"]
    dots = [group.find("circle") for group in groups]
    x, y = ([float(dot.get(key, "nan")) for dot in dots if dot is not None] for key in ("cx", "cy"))
    assert x[0] < x[2] < x[1]
    assert math.isclose(x[2] - x[0], x[1] - x[2], abs_tol=0.2)  # a logarithmic axis
    assert y[0] > y[2] > y[1]  # up is more
    ends = [group.find("line") for group in groups]
    assert all(
        float(end.get("y2", "nan")) < place < float(end.get("y1", "nan"))
        for end, place in zip(ends, y, strict=True)
        if end is not None
    )


def test_a_curve_goes_from_its_first_to_its_last_point() -> None:
    lines = {"a": [[0, 5.0], [10, 1.0]], "b": [[5, 3.0], [10, 5.0]]}
    drawn = ElementTree.fromstring(charts.curves(lines, {"a": "red", "b": "blue"}, "loss"))
    first, second = (
        [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
        for line in drawn.findall("polyline")
    )
    assert first[0] < second[0] < first[1]
    assert first[1][0] == second[1][0]
    assert first[0][1] == second[1][1] < second[0][1] < first[1][1]


@pytest.mark.parametrize(
    ("step", "nice"), [(0.9, 1.0), (1.0, 1.0), (1.2, 2.0), (23.0, 50.0), (0.07, 0.1), (0.0, 1.0)]
)
def test_round_steps(step: float, nice: float) -> None:
    assert charts._round_step(step) == pytest.approx(nice)


@given(st.floats(1e-3, 1e6), st.floats(1.0, 1e4))
def test_round_costs_lie_in_the_picture(low: float, ratio: float) -> None:
    found = charts._cost_ticks(low, low * ratio)
    assert 1 <= len(found) <= 8
    assert found == sorted(found)
    assert all(0.83 * low <= one <= 1.2 * low * ratio for one in found)


def test_names_and_cells_are_text() -> None:
    point = Point(HOSTILE, 1.0, 50.0, 40.0, 60.0)
    drawn = charts.scatter([point], {HOSTILE: "red"}, HOSTILE) + charts.legend({HOSTILE: "red"})
    drawn += charts.curves({HOSTILE: [[0, 1.0], [1, 2.0]]}, {HOSTILE: "red"}, "loss")
    drawn += page._table([HOSTILE], [[HOSTILE]]) + page._section(HOSTILE, "text")
    assert "<script" not in drawn
    assert drawn.count("&lt;script") >= 7


def test_a_section_without_content_is_left_out() -> None:
    assert page._section("Latency", "<p>a note</p>", "") == ""
    assert page._table(["model"], []) == ""


@given(COSTS)
def test_everything_is_drawn_inside_the_axes(pairs: list[tuple[int, int]]) -> None:
    every = points(pairs)
    drawn = ElementTree.fromstring(charts.scatter(every, {one.name: "red" for one in every}, "ms"))
    marks = [mark for group in drawn.findall("g") for mark in (group.find("circle"), group.find("line"))]
    for mark in marks:
        assert mark is not None
        for key in ("cx", "x1"):
            assert charts._LEFT < float(mark.get(key, 300.0)) < charts.WIDTH - charts._RIGHT
        for key in ("cy", "y1", "y2"):
            assert charts._TOP < float(mark.get(key, 100.0)) < charts.HEIGHT - charts._BOTTOM
    lines = drawn.findall("line")
    assert 2 <= len(lines) <= 6
    assert all(charts._TOP <= float(line.get("y1", "0")) <= charts.HEIGHT - charts._BOTTOM for line in lines)
    assert {line.get("x2") for line in lines} == {str(charts.WIDTH - charts._RIGHT)}


def test_lines_of_the_axis_stand_at_their_numbers() -> None:
    every = points([(1, 20), (2, 80)])
    drawn = ElementTree.fromstring(charts.scatter(every, {"0": "red", "1": "red"}, "ms"))
    dots = [float(dot.get("cy", "nan")) for dot in drawn.iter("circle")]
    numbers = [
        float(text.text or "nan") for text in drawn.findall("text") if text.get("text-anchor") == "end"
    ]
    places = [float(line.get("y1", "nan")) for line in drawn.findall("line")]
    assert numbers == [20.0, 40.0, 60.0, 80.0]
    assert [places[0], places[-1]] == pytest.approx(dots, abs=0.2)


def test_ticks_of_costs_are_enough_and_round() -> None:
    assert charts._cost_ticks(1.0, 100.0) == [1.0, 10.0, 100.0]
    assert charts._cost_ticks(1.1, 2.2) == [1.0, 2.0]
    assert charts._cost_ticks(42.0, 42.0) == [42.0]  # no two round numbers are near: the end itself


def test_ends_that_are_not_round_are_rounded() -> None:
    ends = [Point(name, cost, 20.0, 19.0, 21.0) for name, cost in (("0", 1.20163), ("1", 2.24))]
    drawn = ElementTree.fromstring(charts.scatter(ends, {"0": "red", "1": "red"}, "ms"))
    ticks = [text.text for text in drawn.findall("text") if text.get("y") == str(charts.HEIGHT - 26)]
    assert ticks == ["1.2", "2.24"]
