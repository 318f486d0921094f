"""The condition of the fine-tuning benchmark on two lists of scores, one score per seed."""

from __future__ import annotations

import pytest
from scipy.stats import ttest_rel

from tests.benchmarks.bench_evaluation import difference, is_not_lower

REFERENCE = [0.80, 0.82, 0.81, 0.79, 0.83, 0.80]


def moved(by: float, noise: float) -> list[float]:
    return [score + by + (noise if seed % 2 else -noise) for seed, score in enumerate(REFERENCE)]


@pytest.mark.parametrize(
    ("by", "noise", "holds"),
    [
        (0.0, 0.005, True),
        (0.05, 0.005, True),
        (-0.004, 0.005, True),  # p = 0.06
        (-0.005, 0.005, False),  # p = 0.04
        (0.0, 0.05, False),  # a standard error of two points: the seeds are too few
    ],
)
def test_scores_are_lower_if_a_paired_test_says_so(by: float, noise: float, holds: bool) -> None:
    found = moved(by, noise)
    assert is_not_lower(found, REFERENCE) is holds
    mean, error = difference(found, REFERENCE)
    assert mean == pytest.approx(by)
    tested = ttest_rel(found, REFERENCE, alternative="less")
    assert mean / error == pytest.approx(tested.statistic)
    assert holds == (tested.pvalue >= 0.05 and error <= 0.01)
