"""Scores equal those of reference implementations; ``references`` itself runs 10,000 cases of each."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluation import references


@pytest.mark.parametrize("name", list(references.CHECKS))
def test_scores_are_those_of_the_reference(name: str) -> None:
    package, check = references.CHECKS[name]
    if not references.is_installed(package):
        pytest.skip(f"{package} is not installed")
    random = np.random.default_rng(1)
    for _ in range(150):
        check(random)
