"""95 % intervals of scores, retention and gap closed, computed from predictions alone.

A score is the median over S fine-tuning seeds of a metric on n dev examples. It has two sources of error: the
choice of the dev examples and the choice of the seeds.

* Examples: the dev set is resampled with replacement (`resampling` does it), with the same examples for
  every seed and model, so that models are compared in pairs. The covariance of the medians over resamples is
  the bootstrap estimate (Efron and Tibshirani 1993, chapter 6), with n - 1 degrees of freedom.
* Seeds: the variance between a model's seeds, minus the part that the examples explain, is divided by S and
  multiplied by ``MEDIAN_VARIANCE``. Without the subtraction it has S - 1 degrees of freedom. The seeds of
  different models count as independent. Nothing is subtracted if that makes the interval shorter.

The two variances are added. The interval is score +- t sqrt(variance), with the degrees of freedom of Welch
and Satterthwaite (Satterthwaite 1946, Biometrics Bulletin 2:110). Percentiles of a bootstrap that also
resamples three seeds would be too narrow: they cannot lie beyond the worst and the best seed, but the true
median does so in one of four cases.

docs/evaluation.md says what an interval covers, and when it is too short.

Dimensions of arrays: M models, S seeds, R resamples, n examples of a dev set. A contrast [M] has one
coefficient per model: ``contrast . scores`` is one model's score, or the difference of two models' scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.measures.resampling import Weights, resamples

CONFIDENCE = 0.95
MEDIAN_VARIANCE = {2: 1.0, 3: 1.346, 4: 1.193, 5: 1.434}
"""S -> S times the variance of the median of S standard normal numbers. Larger S use the limit, pi / 2."""

Scorer = Callable[[Weights], np.ndarray]
"""Function of one model and seed: weights of resamples -> the task's score [R] on each of them."""


@dataclass(frozen=True)
class Component:
    """Error of M models' scores from one of several independent sources."""

    covariance: np.ndarray
    """Covariance of the scores, float64 [M, M]."""
    dof: float
    """Degrees of freedom of the covariance."""
    unsubtracted: Component | None = None
    """If the source is the seeds: the error without the subtraction, with larger covariance and ``dof``."""


@dataclass(frozen=True)
class Estimates:
    """Scores of M models on one task, or their means over tasks, with the errors of these scores."""

    scores: np.ndarray
    """Medians over seeds, float64 [M]."""
    components: tuple[Component, ...]

    def narrowest(self, contrast: np.ndarray) -> tuple[Component, ...]:
        """Returns the components with or without the subtraction: those that give the shorter interval.

        A small difference of two large variances has almost no degrees of freedom, so its interval is
        uselessly wide. The variance without the subtraction is too large, but its interval is valid.
        """
        unsubtracted = tuple(component.unsubtracted or component for component in self.components)
        return min((self.components, unsubtracted), key=lambda components: _half_width(components, contrast))


def _variance_and_t(components: Sequence[Component], contrast: np.ndarray) -> tuple[float, float]:
    """Returns the variance of ``contrast . scores`` and the t factor of its 95 % interval."""
    from scipy.special import stdtrit

    variance, dof = _variance(components, contrast)
    return variance, float(stdtrit(dof, (1 + CONFIDENCE) / 2)) if variance else 0.0


def _variance(components: Sequence[Component], contrast: np.ndarray) -> tuple[float, float]:
    """Returns the variance of ``contrast . scores`` and its degrees of freedom; (0, 0) without variance."""
    variances = [float(contrast @ component.covariance @ contrast) for component in components]
    total = sum(variances)
    if total <= 0:
        return 0.0, 0.0
    return total, total**2 / sum(
        variance**2 / component.dof for variance, component in zip(variances, components, strict=True)
    )


def _half_width(components: Sequence[Component], contrast: np.ndarray) -> float:
    variance, factor = _variance_and_t(components, contrast)
    return factor * math.sqrt(variance)


def estimate(scorers: Sequence[Sequence[Scorer]], sizes: Mapping[str, int]) -> Estimates:
    """Returns scores and errors on one task. scorers: [M][S]; sizes: number of examples of each dev set.

    Resamples have a fixed random seed, so the same predictions give the same result bit for bit.
    """
    dev_set = {name: np.ones((size, 1)) for name, size in sizes.items()}
    scores = [[float(scorer(dev_set)[0]) for scorer in seeds] for seeds in scorers]
    batches: list[list[list[np.ndarray]]] = [[[] for _ in seeds] for seeds in scorers]
    for weights in resamples(sizes):
        for model, seeds in enumerate(scorers):
            for seed, scorer in enumerate(seeds):
                batches[model][seed].append(scorer(weights))
    resampled = [np.asarray([np.concatenate(one) for one in seeds]) for seeds in batches]  # M times [S, R]
    medians = np.asarray([np.median(seeds, axis=0) for seeds in resampled])
    components = [Component(np.atleast_2d(np.cov(medians)), max(1, sum(sizes.values()) - 1))]
    for model, (model_scores, model_resampled) in enumerate(zip(scores, resampled, strict=True)):
        share, variance = seed_variance(np.asarray(model_scores), model_resampled)
        if share > 0:
            covariance, dof = np.zeros((len(scores), len(scores))), len(model_scores) - 1
            covariance[model, model] = variance
            unsubtracted = Component(covariance, dof)
            components.append(Component(share * covariance, dof * share**2, unsubtracted))
    return Estimates(np.asarray([np.median(seeds) for seeds in scores]), tuple(components))


def seed_variance(scores: np.ndarray, resampled: np.ndarray) -> tuple[float, float]:
    """Returns (share, variance): the variance of the median of ``scores`` [S], and the seeds' share of it.

    resampled: [S, R]. A part of the seeds' variance is due to the examples, since each seed makes mistakes on
    other examples. The variance over examples already contains that part, so the seeds' share is the rest.
    The part is estimated by the variance, over resamples, of the seeds' distances from their mean.
    """
    count = len(scores)
    if count < 2:
        return 0.0, 0.0
    between_seeds = float(np.var(scores, ddof=1))
    due_to_examples = float(np.var(resampled - resampled.mean(axis=0), axis=1).sum() / (count - 1))
    share = max(0.0, 1 - due_to_examples / between_seeds) if between_seeds else 0.0
    return share, MEDIAN_VARIANCE.get(count, math.pi / 2) * between_seeds / count


def mean(tasks: Sequence[Estimates]) -> Estimates:
    """Returns means over tasks, whose examples and fine-tuning runs are independent of each other."""
    count = len(tasks)
    components = tuple(_divide(component, count**2) for task in tasks for component in task.components)
    return Estimates(np.mean([task.scores for task in tasks], axis=0), components)


def _divide(component: Component, divisor: int) -> Component:
    unsubtracted = component.unsubtracted and _divide(component.unsubtracted, divisor)
    return Component(component.covariance / divisor, component.dof, unsubtracted)


def interval(estimates: Estimates, contrast: np.ndarray) -> tuple[float, float]:
    """Returns the bounds of the 95 % interval of ``contrast . scores``."""
    value = float(contrast @ estimates.scores)
    half_width = _half_width(estimates.narrowest(contrast), contrast)
    return value - half_width, value + half_width


def p_value(estimates: Estimates, contrast: np.ndarray) -> float:
    """Returns the two-sided p-value of the null hypothesis that ``contrast . scores`` is 0.

    p is below 0.05 exactly if the interval does not contain 0. For a difference of two models this is a
    paired test, because both are resampled together. Without variance, p is 1 if the value is 0, otherwise 0.
    """
    from scipy.special import stdtr

    value = float(contrast @ estimates.scores)
    components = estimates.narrowest(contrast)
    variance, dof = _variance(components, contrast)
    if variance <= 0:
        return float(value == 0)
    return float(2 * stdtr(dof, -abs(value) / math.sqrt(variance)))


@dataclass(frozen=True)
class Ratio:
    """Ratio of scores, or of differences of scores."""

    value: float
    interval: tuple[float, float] | None
    """Bounds of the 95 % interval; None if it is unbounded."""


def retention(estimates: Estimates, student: int, teacher: int) -> Ratio | None:
    """Returns student / teacher, given their model numbers; None if the teacher's score is not positive."""
    unit = np.eye(len(estimates.scores))
    return ratio(estimates, unit[student], unit[teacher])


def gap_closed(estimates: Estimates, student: int, undistilled: int, teacher: int) -> Ratio | None:
    """Returns (student - undistilled) / (teacher - undistilled); None if the teacher is not better."""
    unit = np.eye(len(estimates.scores))
    return ratio(estimates, unit[student] - unit[undistilled], unit[teacher] - unit[undistilled])


def ratio(estimates: Estimates, numerator: np.ndarray, denominator: np.ndarray) -> Ratio | None:
    """Returns the quotient of two contrasts of the scores; None if the divisor is not positive.

    Its interval is Fieller's (1954, JRSS B 16:175): every g for which the interval of the contrast
    numerator - g denominator contains 0. It is unbounded if the interval of the divisor contains 0.
    """
    top, bottom = float(numerator @ estimates.scores), float(denominator @ estimates.scores)
    if bottom <= 0:
        return None
    value = top / bottom
    components = estimates.narrowest(numerator - value * denominator)
    _, factor = _variance_and_t(components, numerator - value * denominator)
    pair = np.stack([numerator, denominator])
    covariance = sum((pair @ component.covariance @ pair.T for component in components), np.zeros((2, 2)))
    # The bounds are the roots g of a g^2 - 2 b g + c.
    (c, b), (_, a) = np.outer([top, bottom], [top, bottom]) - factor**2 * covariance
    if a <= 0:
        return Ratio(value, None)
    root = math.sqrt(max(0.0, b**2 - a * c))
    return Ratio(value, (float((b - root) / a), float((b + root) / a)))
