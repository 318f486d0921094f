"""95 % intervals of scores, retention and gap closed, computed from predictions alone.

A score is the median over S fine-tuning seeds of a metric on n dev examples. Two things make it uncertain:
which examples the dev set happens to hold, and which seeds were run.

* Examples: the dev set is resampled with replacement (``resampling``), the same examples for every seed and
  model, so that models are compared in pairs. The covariance of the medians over resamples is the
  bootstrap's (Efron and Tibshirani 1993, chapter 6). It has n - 1 degrees of freedom.
* Seeds: the variance between a model's seeds, minus the part that resampling the examples explains, is
  divided by S and multiplied by ``MEDIAN_VARIANCE``. Without the subtraction it has S - 1 degrees of freedom.
  The seeds of different models count as independent. If the interval is shorter without the subtraction,
  nothing is subtracted.

The variances are added. The interval is score +- t sqrt(variance) with the degrees of freedom of Welch and
Satterthwaite (Satterthwaite 1946, Biometrics Bulletin 2:110). Percentiles of a bootstrap that also resamples
three seeds would be too narrow where seeds differ. They cannot reach beyond the worst and the best seed, and
the true median is between these two in three of four cases only.

An interval covers another dev set from the same source and other fine-tuning seeds; with one seed, another
dev set alone. It does not cover another pre-training or distillation run, other hyper-parameters, or text of
another kind. It is too short where a score is within a few examples of its bound: that of a model without a
mistake has width 0.

Letters: M models, S seeds, R resamples, n examples of a dev set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.measures.resampling import Weights, resamples

CONFIDENCE = 0.95
MEDIAN_VARIANCE = {1: 1.0, 2: 1.0, 3: 1.346, 4: 1.193, 5: 1.434}
"""S x the variance of the median of S standard normal numbers; pi / 2, its limit, is used beyond."""

Scorer = Callable[[Weights], np.ndarray]
"""One model and seed: the task's score [R] of every resample."""


@dataclass(frozen=True)
class Component:
    """One independent source of error in the scores of M models."""

    covariance: np.ndarray
    """float64 [M, M]"""
    freedom: float
    """Degrees of freedom of that covariance."""
    wider: Component | None = None
    """The same source, overestimated, with more degrees of freedom."""


@dataclass(frozen=True)
class Estimates:
    """Scores of M models on one task, or means over tasks."""

    scores: np.ndarray
    """float64 [M], medians over seeds."""
    components: tuple[Component, ...]

    def error(self, contrast: np.ndarray) -> tuple[float, float]:
        """Variance of ``contrast`` [M] . scores, and the t factor of its 95 % interval."""
        return _error(self.narrowest(contrast), contrast)

    def narrowest(self, contrast: np.ndarray) -> tuple[Component, ...]:
        """The components with or without the subtraction: those that give the shorter interval.

        A small difference of two large variances has almost no degrees of freedom, so its interval is
        uselessly wide. The variance without the subtraction is too large, but its interval is valid.
        """
        wider = tuple(component.wider or component for component in self.components)
        return min((self.components, wider), key=lambda components: _half_width(components, contrast))


def _error(components: Sequence[Component], contrast: np.ndarray) -> tuple[float, float]:
    from scipy.special import stdtrit

    variance, freedom = _variance(components, contrast)
    return variance, float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) if variance else 0.0


def _variance(components: Sequence[Component], contrast: np.ndarray) -> tuple[float, float]:
    """The variance of ``contrast`` . scores and its degrees of freedom; 0 and 0 if there is no variance."""
    parts = [float(contrast @ part.covariance @ contrast) for part in components]
    variance = sum(parts)
    if variance <= 0:
        return 0.0, 0.0
    return variance, variance**2 / sum(
        part**2 / one.freedom for part, one in zip(parts, components, strict=True)
    )


def _half_width(components: Sequence[Component], contrast: np.ndarray) -> float:
    variance, factor = _error(components, contrast)
    return factor * math.sqrt(variance)


def estimate(scorers: Sequence[Sequence[Scorer]], sizes: Mapping[str, int]) -> Estimates:
    """Scores and errors on one task. scorers: [M][S]; sizes: examples of each dev set.

    The same predictions give the same bits: resamples come from a fixed seed.
    """
    itself = {part: np.ones((size, 1)) for part, size in sizes.items()}
    actual = [[float(scorer(itself)[0]) for scorer in seeds] for seeds in scorers]
    drawn: list[list[list[np.ndarray]]] = [[[] for _ in seeds] for seeds in scorers]
    for weights in resamples(sizes):
        for model, seeds in enumerate(scorers):
            for seed, scorer in enumerate(seeds):
                drawn[model][seed].append(scorer(weights))
    values = [np.asarray([np.concatenate(chunks) for chunks in seeds]) for seeds in drawn]  # M of [S, R]
    medians = np.asarray([np.median(seeds, axis=0) for seeds in values])
    freedom = max(1, sum(sizes.values()) - 1)
    components = [Component(np.atleast_2d(np.cov(medians)), freedom)]
    for model, (scores, resampled) in enumerate(zip(actual, values, strict=True)):
        share, whole = seed_variance(np.asarray(scores), resampled)
        if share > 0:
            own, most = np.zeros((len(actual), len(actual))), len(scores) - 1
            own[model, model] = whole
            components.append(Component(share * own, most * share**2, Component(own, most)))
    return Estimates(np.asarray([np.median(scores) for scores in actual]), tuple(components))


def seed_variance(scores: np.ndarray, resampled: np.ndarray) -> tuple[float, float]:
    """(share, variance): the variance of a median of scores [S] over seeds, and the seeds' own share of it.

    resampled: [S, R]. Scores of two seeds also differ because each seed errs on other examples. The variance
    over examples already contains that part. It is estimated by the variance, over resamples, of the seeds'
    distances from their mean. The share is 0 if this explains all of the variance between seeds.
    """
    count = len(scores)
    if count < 2:
        return 0.0, 0.0
    between = float(np.var(scores, ddof=1))
    examples = float(np.var(resampled - resampled.mean(axis=0), axis=1).sum() / (count - 1))
    share = max(0.0, 1 - examples / between) if between else 0.0
    return share, MEDIAN_VARIANCE.get(count, math.pi / 2) * between / count


def mean(tasks: Sequence[Estimates]) -> Estimates:
    """Means over tasks, whose examples and fine-tuning runs are independent of each other."""
    count = len(tasks)
    parts = tuple(_divided(component, count**2) for task in tasks for component in task.components)
    return Estimates(np.mean([task.scores for task in tasks], axis=0), parts)


def _divided(component: Component, by: int) -> Component:
    wider = component.wider and _divided(component.wider, by)
    return Component(component.covariance / by, component.freedom, wider)


def interval(estimates: Estimates, contrast: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval of ``contrast`` [M] . scores: a model's score, or a difference of two."""
    value = float(contrast @ estimates.scores)
    half = _half_width(estimates.narrowest(contrast), contrast)
    return value - half, value + half


def p_value(estimates: Estimates, contrast: np.ndarray) -> float:
    """Two-sided p of the hypothesis that ``contrast`` [M] . scores is 0: below 0.05 if its interval lacks 0.

    For a difference of two models it is a paired test, because both are resampled together. It is 1 where
    the models do not differ at all, and 0 where they differ and no resample shows an error.
    """
    from scipy.special import stdtr

    value = float(contrast @ estimates.scores)
    components = estimates.narrowest(contrast)
    variance, freedom = _variance(components, contrast)
    if variance <= 0:
        return float(value == 0)
    return float(2 * stdtr(freedom, -abs(value) / math.sqrt(variance)))


@dataclass(frozen=True)
class Ratio:
    """``interval``: ends of the 95 % interval; None where any ratio, however large, is possible."""

    value: float
    interval: tuple[float, float] | None


def retention(estimates: Estimates, student: int, teacher: int) -> Ratio | None:
    """student / teacher, positions among the models. None where the teacher's score is not positive."""
    unit = np.eye(len(estimates.scores))
    return ratio(estimates, unit[student], unit[teacher])


def gap_closed(estimates: Estimates, student: int, undistilled: int, teacher: int) -> Ratio | None:
    """(student - undistilled) / (teacher - undistilled); None where the teacher is not the better one."""
    unit = np.eye(len(estimates.scores))
    return ratio(estimates, unit[student] - unit[undistilled], unit[teacher] - unit[undistilled])


def ratio(estimates: Estimates, numerator: np.ndarray, denominator: np.ndarray) -> Ratio | None:
    """(numerator . scores) / (denominator . scores) of contrasts [M]; None where the divisor is not positive.

    Its interval is Fieller's (1954, JRSS B 16:175): every g for which (numerator - g denominator) . scores
    has an interval that contains 0. It is unbounded if the interval of the divisor contains 0.
    """
    top, bottom = float(numerator @ estimates.scores), float(denominator @ estimates.scores)
    if bottom <= 0:
        return None
    value = top / bottom
    components = estimates.narrowest(numerator - value * denominator)
    _, factor = _error(components, numerator - value * denominator)
    pair = np.stack([numerator, denominator])
    covariance = sum((pair @ one.covariance @ pair.T for one in components), np.zeros((2, 2)))
    (first, middle), (_, last) = np.outer([top, bottom], [top, bottom]) - factor**2 * covariance
    if last <= 0:
        return Ratio(value, None)
    half = math.sqrt(max(0.0, middle**2 - last * first))
    return Ratio(value, (float((middle - half) / last), float((middle + half) / last)))
