"""What a running pass tells, and that telling it costs the driver no look at the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from infra.files import storage
from infra.settings.recipe_file import load_recipe
from offline_teacher.inputs.source import find_source, spec_of, tokenising
from offline_teacher.running import pass_rates, teacher_pass
from offline_teacher.running.pass_rates import Environments, Rates
from offline_teacher.store.paths import TASKS
from tests.offline_teacher.local_pool import LocalCluster, LocalPool, make
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rates")
    return write_recipe(directory, write_text(directory / "text.txt", 40), save_bert(directory / "model"))


def test_rates_of_all_places_and_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pass_rates.time, "monotonic", lambda: now[0])
    rates = Rates(4, retries=1)
    now[0] = 110.0
    due = [rates.count(place, 1_000) for place in ("node-0", "node-0", "node-1", "node-0")]
    assert all(due)
    assert rates.words(retries=3) == "400 tokens/s (100 to 300 per place), 2 retries"
    metrics = rates.metrics(retries=3)
    assert (metrics["tokens_per_s"], metrics["tasks_left"], metrics["retries"]) == (400, 0, 2)
    assert (metrics["tokens_per_s_slowest_place"], metrics["tokens_per_s_fastest_place"]) == (100, 300)


def test_rates_are_reported_a_hundred_times_whatever_the_number_of_tasks() -> None:
    rates = Rates(10_000, retries=0)
    assert sum(rates.count("node-0", 1) for _ in range(10_000)) == pass_rates.REPORTS


class StoreUnseen:
    """A pool whose items are done at once; meanwhile nobody may look at a store."""

    retries = 0

    def run(self, items: list[Any], done: Any, say: Any, quarantine: Any) -> list[Any]:
        def refuse(*arguments: object, **options: object) -> None:
            raise AssertionError("the driver looks at the store for a task")

        with pytest.MonkeyPatch.context() as patch:
            for name in (
                "exists",
                "size",
                "list_names",
                "read_bytes",
                "read_small",
                "publish_bytes",
                "remove",
            ):
                patch.setattr(storage, name, refuse)
            for item in items:
                done(item, {"tokens": 1, "place": "node-0"})
        return []


def test_the_driver_does_nothing_for_a_task_but_count_it(recipe: Path, tmp_path: Path) -> None:
    source, decided = find_source(load_recipe(str(recipe), [f"output={tmp_path}"]))
    parts = teacher_pass.parts_of(decided)
    spec, root = spec_of(decided, source, parts), decided.store_path
    teacher_pass.begin_store(root, spec)
    teacher_pass.publish_files(root, source, spec.layout)
    with LocalCluster(decided) as cluster:
        teacher_pass.build_sequences(parts, tokenising(decided, source), cluster)
    told: list[dict[str, float]] = []
    counts = {split: len(found) for split, found in parts.items()}
    pool: Any = StoreUnseen()
    outcome = teacher_pass._infer(root, spec, "train", counts, pool, told.append)
    assert outcome.new_tokens > 1
    assert told[-1]["tasks"] == outcome.new_tokens


def test_another_environment_is_said_once(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make(recipe)
    environment = store.task_index("train", 0).environment
    capsys.readouterr()
    environments = Environments(store.root, ["train"])
    environments.check("node-0 (cpu)", {"environment": dict(environment)})
    assert capsys.readouterr().err == ""
    for place in ("node-1 (cuda:0)", "node-2 (cuda:0)"):
        environments.check(place, {"environment": {**environment, "device": "NVIDIA H100", "batch_size": 8}})
    said = capsys.readouterr().err
    assert said.count("computes in another environment") == 1
    assert "node-1 (cuda:0)" in said
    assert "batch_size: 4 -> 8" in said
    assert "NVIDIA H100" in said
    assert storage.list_names(storage.join(store.root, TASKS, "train"))


def test_a_corpus_is_listed_once(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every listing asks a remote file for its size, and Parquet for its footer."""
    from offline_teacher import main
    from offline_teacher.cluster import pool

    listed = mock.Mock(wraps=teacher_pass.parts)
    monkeypatch.setattr(teacher_pass, "parts", listed)
    monkeypatch.setattr(pool, "Cluster", LocalCluster)
    assert main.run(load_recipe(str(recipe), [f"output={tmp_path}"])) == 0
    assert listed.call_count == 1


def test_no_worker_is_held_while_the_driver_finishes_the_store(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    finish = teacher_pass.finish_store

    def leave(pool: LocalPool, *error: object) -> None:
        events.append("the workers end")

    def finish_store(*arguments: Any) -> None:
        events.append("the manifest is made")
        finish(*arguments)

    monkeypatch.setattr(LocalPool, "__exit__", leave)
    monkeypatch.setattr(teacher_pass, "finish_store", finish_store)
    make(recipe, f"store.path={tmp_path}/store")
    assert events == ["the workers end", "the workers end", "the manifest is made"]  # of text, and of tasks
