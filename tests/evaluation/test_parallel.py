"""Runs side by side on a real local Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation import parallel
from evaluation.models import Candidate
from evaluation.scores import complete, prepare
from infra.errors import UserError
from infra.sections import Evaluation

SETTINGS = Evaluation(
    tasks=("SST-2",), seeds=(0, 1, 2), epochs=0.2, batch_size=16, learning_rate=3e-3, max_length=16, workers=2
)


@pytest.fixture
def cluster() -> Iterator[None]:
    """One Ray for both calls; starting it is most of the test's time."""
    parallel.start_ray(2)
    yield
    parallel.stop_ray()


@pytest.mark.end_to_end
@pytest.mark.usefixtures("cluster")
def test_ray_workers_give_what_one_process_gives(encoder: str, toy_data: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data)
    results = {}
    for workers in (1, 2):
        plan = prepare([Candidate("m", encoder)], settings, str(tmp_path / str(workers)))
        found = complete(plan, workers)["m"]["SST-2"]
        results[workers] = [(one["seed"], one["metrics"], one["key"]) for one in found]
        assert sorted(path.name for path in (tmp_path / str(workers) / "m/SST-2").iterdir()) == [
            "seed-0.json",
            "seed-1.json",
            "seed-2.json",
        ]
    assert results[1] == results[2]
    settings = dataclasses.replace(settings, learning_rate=1e30, epochs=5)
    plan = prepare([Candidate("m", encoder)], settings, str(tmp_path / "wrong"))
    with pytest.raises(UserError, match="loss is not finite"):
        complete(plan, workers=2)
