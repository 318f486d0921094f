"""Runs side by side on a real local Ray."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from evaluation.candidates.models import Candidate
from evaluation.finetuning import parallel
from evaluation.finetuning.jobs import Job
from evaluation.finetuning.scores import complete, prepare
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.ray_cluster import connect
from infra.settings.sections import Evaluation

SETTINGS = Evaluation(
    tasks=("SST-2",), seeds=(0, 1, 2), epochs=0.2, batch_size=16, learning_rate=3e-3, max_length=16, workers=2
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Starts one Ray for all tests, which takes most of the time, with two pretended GPUs."""
    connect(None, "RAY_ADDRESS", parallel.PACKAGES, num_cpus=2, num_gpus=2)
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("workers", "gpus", "share"), [(4, 8, 1), (8, 8, 1), (9, 8, 1 / 2), (3, 1, 1 / 3), (2, 0, 0)]
)
def test_every_worker_has_a_gpu_before_two_share_one(workers: int, gpus: int, share: float) -> None:
    assert parallel.gpu_share(workers, gpus) == share


@pytest.mark.end_to_end
@pytest.mark.usefixtures("cluster")
def test_runs_side_by_side_have_a_gpu_each(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two wait for each other, so that both are there at once. The third waits for a freed GPU."""

    def gpu(job: Job, *_: object) -> dict[str, str]:
        (tmp_path / f"there-{job.seed}").touch()
        while len(list(tmp_path.glob("there-*"))) < 2:
            time.sleep(0.01)
        return {"gpu": os.environ["CUDA_VISIBLE_DEVICES"]}

    monkeypatch.setattr(parallel, "_run_with_threads", gpu)
    settings = dataclasses.replace(SETTINGS, data=toy_data)
    plan = prepare([Candidate("m", encoder)], settings, str(tmp_path / "scores"))
    found: dict[int, str] = {}
    parallel.run_all(plan.unfinished, 2, lambda job, result: found.update({job.seed: result["gpu"]}))
    assert sorted([found[0], found[1]]) == ["0", "1"]
    assert found[2] in ("0", "1")


@pytest.mark.end_to_end
@pytest.mark.usefixtures("cluster")
def test_ray_workers_give_what_one_process_gives(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without GPUs, because Ray ends a worker that has used one, and a new one takes seconds to start."""
    monkeypatch.setattr(parallel, "gpu_share", lambda workers, gpus: 0.0)
    settings = dataclasses.replace(SETTINGS, data=toy_data)
    results = {}
    for workers in (1, 2):
        plan = prepare([Candidate("m", encoder)], settings, str(tmp_path / str(workers)))
        found = complete(plan, workers)["m"]["SST-2"]
        results[workers] = [(one["seed"], one["metrics"], one["key"]) for one in found]
        assert sorted(path.name for path in (tmp_path / str(workers) / "m/SST-2").iterdir()) == [
            "seed-0.json",
            "seed-0.predictions.parquet",
            "seed-1.json",
            "seed-1.predictions.parquet",
            "seed-2.json",
            "seed-2.predictions.parquet",
        ]
    assert results[1] == results[2]
    settings = dataclasses.replace(settings, learning_rate=1e30, epochs=5)
    plan = prepare([Candidate("m", encoder)], settings, str(tmp_path / "wrong"))
    with pytest.raises(UserError, match="loss is not finite"):
        complete(plan, workers=2)


@pytest.mark.end_to_end
@pytest.mark.usefixtures("cluster")
def test_a_run_whose_workers_only_die_is_named(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*arguments: object) -> None:
        os._exit(1)

    monkeypatch.setattr(parallel, "_run_with_threads", dies)
    monkeypatch.setattr(parallel, "REPEATS", 1)
    plan = prepare([Candidate("m", encoder)], dataclasses.replace(SETTINGS, data=toy_data), str(tmp_path))
    with pytest.raises(UserError, match="m SST-2 seed .: its worker died 2 times") as raised:
        complete(plan, workers=2)
    assert raised.value.exit_code == EXIT_INCOMPLETE
