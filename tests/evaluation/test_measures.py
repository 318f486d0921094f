"""Metrics of resamples against the metrics themselves; intervals against simulations whose truth is known."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import t

from evaluation.measures import intervals, metrics, resampling
from evaluation.measures.intervals import Component, Estimates, Scorer


def test_every_metric_has_its_form_for_resamples() -> None:
    assert resampling.METRICS.keys() == metrics.METRICS.keys()


def random_vectors(name: str, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors of 1 to 40 numbers, often with ties, sometimes constant."""
    size, classes = int(generator.integers(1, 41)), int(generator.integers(1, 5))
    if name in ("pearson", "spearman"):
        first, second = (generator.normal(3, 2, size).round(generator.integers(0, 4)) for _ in range(2))
        return (first + second).astype(np.float32), second.astype(np.float32)
    classes = min(classes, 2) if name == "f1" else classes
    return generator.integers(0, classes, size), generator.integers(0, classes, size)


@pytest.mark.parametrize("name", list(metrics.METRICS))
def test_a_resample_scores_as_its_repeated_examples_do(name: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        predicted, expected = random_vectors(name, generator)
        weights = resampling._occurrences(generator, 3, len(predicted))
        found = resampling.METRICS[name](predicted, expected, weights)
        for column, value in zip(weights.T.astype(int), found, strict=True):
            resample = np.repeat(predicted, column), np.repeat(expected, column)
            assert value == pytest.approx(metrics.METRICS[name](*resample), abs=1e-9)


@pytest.mark.parametrize("name", list(metrics.METRICS))
def test_constant_vectors_score_zero(name: str) -> None:
    constant, other = np.full(30, 0.1, np.float32), np.arange(30) % 2
    if name not in ("pearson", "spearman"):
        constant, other = np.zeros(30, int), np.ones(30, int)
    found = resampling.METRICS[name](constant, other, np.ones((30, 1)))
    assert found.tolist() == [0.0]


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman"])
def test_a_resample_of_one_example_again_and_again_scores_zero(name: str) -> None:
    """But for rounding, which must not be taken for a correlation."""
    first, second = np.random.default_rng(0).normal(3, 1, (2, 49)).astype(np.float32)
    if name not in ("pearson", "spearman"):
        first, second = np.zeros(49, int), np.ones(49, int)
    assert resampling.METRICS[name](first, second, 49 * np.eye(49)).tolist() == [0.0] * 49


def test_resamples_hold_as_many_examples_as_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "MAX_WEIGHTS", 70)
    chunks = list(resampling.resamples({"dev_matched": 10, "dev_mismatched": 4}, count=20))
    assert [chunk["dev_matched"].shape for chunk in chunks] == [(10, 7), (10, 7), (10, 6)]
    assert all((chunk["dev_mismatched"].sum(axis=0) == 4).all() for chunk in chunks)
    together = np.concatenate([chunk["dev_matched"] for chunk in chunks], axis=1)
    assert len({tuple(column) for column in together.T}) == 20
    assert together.mean() == 1


def test_a_thousand_resamples_are_drawn_in_batches_that_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    (small,) = resampling.resamples({"dev": 3})
    assert small["dev"].shape == (3, 1000)
    large = next(resampling.resamples({"dev": 40_430, "other": 3}))  # 51 times 40,430 is just below 2^21
    assert (large["dev"].shape, large["other"].shape) == ((40_430, 51), (3, 51))
    monkeypatch.setattr(resampling, "MAX_WEIGHTS", 3)  # fewer than the examples
    assert [batch["dev"].shape for batch in resampling.resamples({"dev": 4}, count=2)] == [(4, 1), (4, 1)]


def test_variance_of_medians() -> None:
    numbers = np.random.default_rng(0).standard_normal((400_000, 5))
    for count, factor in intervals.MEDIAN_VARIANCE.items():
        found = count * np.var(np.median(numbers[:, :count], axis=1))
        assert factor == pytest.approx(found, rel=0.01)
    assert intervals.MEDIAN_VARIANCE.keys() == {2, 3, 4, 5}
    for count, factor in ((2, 1), (7, np.pi / 2)):  # of more than five seeds, the limit
        scores = np.linspace(0.6, 0.8, count)
        share, variance = intervals.seed_variance(scores, np.tile(scores[:, None], 9))
        assert (share, variance) == (1, pytest.approx(factor * np.var(scores, ddof=1) / count))


def test_the_seeds_share_is_what_the_examples_do_not_explain() -> None:
    """The variance that they explain is the sample variance of the seeds' errors, averaged over resamples."""
    scores = np.asarray([0.6, 0.9, 0.7])
    resampled = scores[:, None] + np.random.default_rng(0).normal(0, 0.1, (3, 400))
    errors = resampled - resampled.mean(axis=1, keepdims=True)
    explained = np.var(errors, axis=0, ddof=1).mean()
    share, variance = intervals.seed_variance(scores, resampled)
    between = np.var(scores, ddof=1)
    assert share == pytest.approx(1 - explained / between)
    assert variance == pytest.approx(1.346 * between / 3)


# --- intervals ----------------------------------------------------------------------------------------------

ONE = np.ones(1)


def estimate(*models: list[np.ndarray], expected: np.ndarray, metric: str = "accuracy") -> Estimates:
    """Of the class ids that the seeds of each model predicted."""

    def scorer(predicted: np.ndarray) -> Scorer:
        return lambda weights: resampling.METRICS[metric](predicted, expected, weights["dev"])

    return intervals.estimate(
        [[scorer(predicted) for predicted in seeds] for seeds in models], {"dev": len(expected)}
    )


def answers(right: int, size: int = 200) -> np.ndarray:
    """The first ``right`` of ``size`` answers are 1, which is the label of all."""
    return (np.arange(size) < right).astype(int)


LABELS = np.ones(200, int)


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def test_one_seed_is_an_interval_over_examples() -> None:
    found = estimate([answers(160)], expected=LABELS)
    low, high = intervals.interval(found, ONE)
    half = t.ppf(0.975, 199) * np.sqrt(0.8 * 0.2 / 200)
    assert (low, high) == (pytest.approx(0.8 - half, abs=0.006), pytest.approx(0.8 + half, abs=0.006))
    assert [one.dof for one in found.components] == [199]
    assert estimate([answers(1, 1)], expected=np.ones(1, int)).components[0].dof == 1


def test_seeds_that_agree_add_nothing() -> None:
    one, three = (estimate([answers(160)] * seeds, expected=LABELS) for seeds in (1, 3))
    assert intervals.interval(three, ONE) == intervals.interval(one, ONE)
    assert intervals.seed_variance(np.full(3, 0.5), np.full((3, 9), 0.5)) == (0, 0)


def test_seeds_that_err_on_other_examples_add_nothing_twice() -> None:
    """The same quality, mistakes drawn anew for every seed: their mean is known better than one seed is."""
    generator = np.random.default_rng(0)
    seeds = [generator.permutation(answers(160)) for _ in range(3)]
    assert len(estimate(seeds, expected=LABELS).components) == 1
    assert width(intervals.interval(estimate(seeds, expected=LABELS), ONE)) < width(
        intervals.interval(estimate(seeds[:1], expected=LABELS), ONE)
    )


def test_seeds_that_differ_widen_the_interval() -> None:
    found = estimate([answers(right) for right in (120, 160, 180)], expected=LABELS)
    variance = np.var([0.6, 0.8, 0.9], ddof=1)
    component = found.components[1]
    share = float(component.covariance[0, 0]) / (1.346 * variance / 3)
    assert 0.9 < share < 1  # the rest is what the examples between them explain
    assert component.dof == pytest.approx(2 * share**2)
    assert found.scores.tolist() == [0.8]
    assert width(intervals.interval(found, ONE)) > 4 * 2 * np.sqrt(variance / 3)


def test_seeds_with_next_to_no_mistakes_have_a_short_interval() -> None:
    """What is left of their variance after the examples' part has no degrees of freedom to speak of."""
    low, high = intervals.interval(estimate([answers(200), answers(200), answers(198)], expected=LABELS), ONE)
    assert 0.98 < low < 1 < high < 1.02


def test_models_are_compared_on_the_same_examples() -> None:
    first, second = answers(160), answers(162)  # 158 and more in common
    found = estimate([first], [second], expected=LABELS)
    low, high = intervals.interval(found, np.asarray([-1.0, 1.0]))
    assert low < 0.01 < high
    apart = width(intervals.interval(found, np.asarray([1.0, 0.0])))
    assert high - low < apart / 3  # independent dev sets: 1.4 times as wide as one
    same = estimate([first], [first], expected=LABELS)
    assert width(intervals.interval(same, np.asarray([-1.0, 1.0]))) == pytest.approx(0, abs=1e-9)


def test_the_mean_of_two_tasks_is_known_better() -> None:
    task = Estimates(np.asarray([0.6, 0.7]), (Component(np.diag([0.01, 0.02]), 50.0),))
    other = Estimates(np.asarray([0.8, 0.7]), task.components)
    found = intervals.mean([task, other])
    low, high = intervals.interval(found, np.asarray([1.0, 0.0]))
    half = t.ppf(0.975, 100) * 0.1 / np.sqrt(2)
    assert (low, high) == (pytest.approx(0.7 - half), pytest.approx(0.7 + half))


def test_the_same_predictions_give_the_same_bits() -> None:
    seeds = [answers(right) for right in (120, 160, 180)]
    first, second = (intervals.interval(estimate(seeds, expected=LABELS), ONE) for _ in range(2))
    assert first == second


# --- simulations: the truth is known, so the share of intervals that hold it is too -------------------------


def predictions(
    generator: np.random.Generator, labels: np.ndarray, skill: float, spread: float, hardness: np.ndarray
) -> list[np.ndarray]:
    """Three seeds' class ids: right where skill, the seed's luck, the example and chance sum above 0."""
    luck = spread * generator.standard_normal(3)
    chance = generator.standard_normal((3, len(labels))) * np.sqrt(0.4)
    right = skill + luck[:, None] + hardness + chance > 0
    return list(np.where(right, labels, 1 - labels))


def truth(metric: str, skill: float) -> float:
    """Of unlimited examples, 0.4 of them of class 1, and the median seed."""
    p = float(ndtr(skill))
    tp, fn, fp, tn = 0.4 * p, 0.4 * (1 - p), 0.6 * (1 - p), 0.6 * p
    if metric == "accuracy":
        return p
    if metric == "f1":
        return 2 * tp / (2 * tp + fp + fn)
    return (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def graded(generator: np.random.Generator, labels: np.ndarray, spread: float) -> list[np.ndarray]:
    """Three seeds' scores of texts: the label and noise, half of which the seeds share. Seeds have more or
    less of it."""
    common = generator.standard_normal(len(labels))
    own = generator.standard_normal((3, len(labels)))
    noise = 0.8 * np.exp(spread * generator.standard_normal((3, 1)))
    return list(labels + noise * (common + own) / np.sqrt(2))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 resamples, for thousands of estimates."""
    monkeypatch.setattr(intervals, "resamples", partial(intervals.resamples, count=200))


REPEATS = 600
CASES = [
    (metric, size, spread)
    for metric in ("accuracy", "matthews", "f1")
    for size, spread in ((100, 0.1), (200, 0.0), (200, 0.1), (400, 0.05), (400, 0.3))
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("metric", "size", "spread"), CASES)
def test_intervals_hold_the_truth(metric: str, size: int, spread: float) -> None:
    """Spread 0.3 are seeds some 8 points of accuracy apart, 0.05 between one and two."""
    generator = np.random.default_rng(size)
    held = 0
    for _ in range(REPEATS):
        labels = (generator.random(size) < 0.4).astype(int)
        hardness = generator.standard_normal(size) * np.sqrt(0.6)
        found = estimate(
            predictions(generator, labels, 0.8, spread, hardness), expected=labels, metric=metric
        )
        low, high = intervals.interval(found, ONE)
        held += low <= truth(metric, 0.8) <= high
    assert 0.92 <= held / REPEATS <= 0.98


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("size", "spread"), [(100, 0.0), (100, 0.2), (200, 0.1), (400, 0.3)])
def test_intervals_of_a_rank_correlation_hold_the_truth(size: int, spread: float) -> None:
    """Of normal variables it is 6 / pi arcsin(r / 2) (Pearson 1907)."""
    generator = np.random.default_rng(size)
    expected = 6 / np.pi * np.arcsin(1 / np.sqrt(1 + 0.8**2) / 2)
    held = 0
    for _ in range(REPEATS):
        labels = generator.standard_normal(size)
        found = estimate(graded(generator, labels, spread), expected=labels, metric="spearman")
        low, high = intervals.interval(found, ONE)
        held += low <= expected <= high
    assert 0.92 <= held / REPEATS <= 0.98


@pytest.mark.usefixtures("quick")
def test_models_of_the_same_skill_rarely_seem_to_differ() -> None:
    """A test at 5 % is wrong about as often; and it finds a difference that is there."""
    generator = np.random.default_rng(0)
    contrast = np.asarray([1.0, -1.0])
    wrong = right = 0
    for _ in range(REPEATS):
        labels = (generator.random(300) < 0.4).astype(int)
        hardness = generator.standard_normal(300) * np.sqrt(0.6)
        one, same, better = (
            predictions(generator, labels, skill, 0.05, hardness) for skill in (0.5, 0.5, 0.9)
        )
        wrong += intervals.p_value(estimate(one, same, expected=labels), contrast) < 0.05
        right += intervals.p_value(estimate(one, better, expected=labels), contrast) < 0.05
    assert wrong / REPEATS <= 0.07
    assert right / REPEATS >= 0.75


def test_p_and_interval_say_the_same() -> None:
    for difference in np.linspace(0.01, 0.4, 40):
        found = Estimates(np.asarray([0.5 + difference, 0.5]), (Component(np.eye(2) * 0.01, 7.0),))
        contrast = np.asarray([1.0, -1.0])
        low, _ = intervals.interval(found, contrast)
        p = intervals.p_value(found, contrast)
        assert (low > 0) == (p < 0.05)
        assert p == pytest.approx(2 * t.sf(difference / np.sqrt(0.02), 7))
        assert intervals.p_value(found, -contrast) == pytest.approx(p)


def test_p_of_models_without_errors() -> None:
    same = Estimates(np.asarray([0.5, 0.5]), (Component(np.zeros((2, 2)), 9.0),))
    assert intervals.p_value(same, np.asarray([1.0, -1.0])) == 1.0
    apart = Estimates(np.asarray([0.6, 0.5]), same.components)
    assert intervals.p_value(apart, np.asarray([1.0, -1.0])) == 0.0


# --- ratios -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_the_interval_of_the_gap_holds_the_truth() -> None:
    """In a few more cases than 95 of 100: the seeds' variance of each of three models is never below 0."""
    generator = np.random.default_rng(0)
    skills = (0.7, 0.2, 0.9)  # student, undistilled, teacher
    student, undistilled, teacher = (truth("accuracy", skill) for skill in skills)
    expected = (student - undistilled) / (teacher - undistilled)
    held, repeats = 0, 600
    for _ in range(repeats):
        labels = (generator.random(300) < 0.4).astype(int)
        hardness = generator.standard_normal(300) * np.sqrt(0.6)
        models = [predictions(generator, labels, skill, 0.1, hardness) for skill in skills]
        ratio = intervals.gap_closed(estimate(*models, expected=labels), 0, 1, 2)
        assert ratio is not None
        low, high = ratio.interval or (-np.inf, np.inf)
        held += low <= expected <= high
    assert 0.92 <= held / repeats <= 0.99


def three(scores: tuple[float, float, float], error: float) -> Estimates:
    """Student, undistilled, teacher with independent errors."""
    return Estimates(np.asarray(scores), (Component(np.eye(3) * error**2, 100.0),))


def test_the_interval_of_a_ratio_is_every_ratio_not_ruled_out() -> None:
    found = three((0.7, 0.5, 0.8), 0.04)
    ratio = intervals.gap_closed(found, 0, 1, 2)
    assert ratio is not None
    assert ratio.interval is not None
    assert ratio.value == pytest.approx(2 / 3)
    grid = np.linspace(-2, 4, 6001)
    factor = t.ppf(0.975, 100)
    variance = 0.04**2 * (1 + (1 - grid) ** 2 + grid**2)
    possible = grid[np.abs(0.2 - 0.3 * grid) <= factor * np.sqrt(variance)]
    assert ratio.interval == (pytest.approx(possible[0], abs=2e-3), pytest.approx(possible[-1], abs=2e-3))


def test_a_ratios_degrees_of_freedom_are_those_of_its_own_contrast() -> None:
    """Of the seeds, the overestimate with two degrees of freedom gives the shorter interval."""
    seeds = np.diag([0.02**2, 0, 0])
    parts = (
        Component(np.eye(3) * 0.01**2, 100.0), Component(0.1 * seeds, 2 * 0.1**2, Component(seeds, 2.0))
    )  # fmt: skip
    ratio = intervals.gap_closed(Estimates(np.asarray([0.7, 0.5, 0.8]), parts), 0, 1, 2)
    assert ratio is not None
    assert ratio.interval is not None
    examples = 0.01**2 * (1 + 1 / 9 + 4 / 9)  # of (1, -1/3, -2/3), the contrast that is 0 at the ratio
    freedom = (examples + 0.02**2) ** 2 / (examples**2 / 100 + 0.02**4 / 2)
    grid = np.linspace(-2, 4, 60_001)
    variance = 0.01**2 * (1 + (1 - grid) ** 2 + grid**2) + 0.02**2
    possible = grid[np.abs(0.2 - 0.3 * grid) <= t.ppf(0.975, freedom) * np.sqrt(variance)]
    assert ratio.interval == (pytest.approx(possible[0], abs=2e-4), pytest.approx(possible[-1], abs=2e-4))


def test_a_gap_that_may_be_none_has_no_interval() -> None:
    ratio = intervals.gap_closed(three((0.7, 0.5, 0.8), 0.2), 0, 1, 2)
    assert ratio is not None
    assert (ratio.value, ratio.interval) == (pytest.approx(2 / 3), None)
    assert intervals.gap_closed(three((0.7, 0.8, 0.8), 0.01), 0, 1, 2) is None
    assert intervals.gap_closed(three((0.7, 0.9, 0.8), 0.01), 0, 1, 2) is None


def test_retention_of_independent_errors() -> None:
    ratio = intervals.retention(three((0.6, 0.5, 0.8), 0.001), 0, 2)
    assert ratio is not None
    assert ratio.interval is not None
    assert ratio.value == pytest.approx(0.75)
    half = t.ppf(0.975, 100) * 0.001 * np.sqrt(1 + 0.75**2) / 0.8  # delta method
    assert ratio.interval == (pytest.approx(0.75 - half, abs=1e-5), pytest.approx(0.75 + half, abs=1e-5))
    assert intervals.retention(three((0.6, 0.5, 0.0), 0.001), 0, 2) is None
    itself = intervals.retention(three((0.6, 0.5, 0.8), 0.7), 0, 0)
    assert itself == intervals.Ratio(1.0, (1.0, 1.0))
