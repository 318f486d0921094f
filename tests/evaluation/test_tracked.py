"""What an evaluation leaves in MLflow, read through MLflow's own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.finetuning import parallel
from evaluation.main import main
from evaluation.report import tracked
from infra.settings.recipe_file import load_recipe
from infra.tracking.run import Run
from offline_teacher.store.store import open_store
from tests.evaluation.families import save_store
from tests.evaluation.report_content import report_content

pytest.importorskip("mlflow")
CHANGES = [
    "tracking.enabled=true", "tracking.system_metrics=false", "evaluation.references=[]",
    "evaluation.seeds=[0,1]", "evaluation.latency_sentences=4",
]  # fmt: skip


def client(output: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{output}/mlflow.db")


def points(server: Any, run: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in server.get_metric_history(run, name)]


@pytest.mark.usefixtures("database")
def test_every_model_and_task_has_a_run_with_a_point_a_seed(recipe_file: str, encoder: str) -> None:
    recipe = load_recipe(recipe_file, CHANGES)
    store = save_store(recipe.store_path, encoder)
    assert main(["--recipe", recipe_file, *CHANGES]) == 0
    server, root = client(Path(recipe.output)), Path(recipe.root)
    ids = json.loads((root / "tracking.json").read_text())
    scores = Path(recipe.evaluation_dir) / "scores"
    for model in ("teacher", "student"):
        child = server.get_run(ids[f"evaluation/{model}/SST-2"])
        assert child.info.run_name == f"{model}/SST-2"
        assert child.info.status == "FINISHED"
        assert child.data.tags.items() >= {
            "mlflow.parentRunId": ids["evaluation"], "model": model, "task": "SST-2"
        }.items()  # fmt: skip
        found = [json.loads((scores / f"{model}/SST-2/seed-{seed}.json").read_text()) for seed in (0, 1)]
        for name in ("score", "dev_score"):
            assert points(server, child.info.run_id, name) == [(0, found[0][name]), (1, found[1][name])]
        assert points(server, child.info.run_id, "accuracy")[1] == (1, found[1]["metrics"]["accuracy"])
        assert points(server, child.info.run_id, "train/loss")[0] == (0, found[0]["train"]["loss"])
    data = Path(recipe.evaluation.data or "")
    inputs = server.get_run(ids["evaluation"]).inputs.dataset_inputs
    named = {one.dataset.name: (json.loads(one.dataset.source), one.tags[0].value) for one in inputs}
    assert named == {
        "store": ({"uri": store}, "evaluation"),
        "SST-2 train": ({"uri": str(data / "SST-2/train.tsv")}, "training"),
        "SST-2 dev": ({"uri": str(data / "SST-2/dev.tsv")}, "evaluation"),
    }
    digests = {f"SST-2 {part}": digest for part, digest in found[0]["key"]["data"].items()}
    digests["store"] = open_store(store).digest
    assert {one.dataset.name: one.dataset.digest for one in inputs} == {
        name: digest.rpartition(":")[2] for name, digest in digests.items()
    }

    (Path(recipe.evaluation_dir) / "report.json").unlink()
    (scores / "student/SST-2/seed-1.json").unlink()
    assert main(["--recipe", recipe_file, *CHANGES]) == 0
    student = ids["evaluation/student/SST-2"]
    assert len(points(server, student, "train/rows_per_second")) == 3  # the seed that ran again, no other
    assert len(points(server, student, "score")) == 2
    assert json.loads((root / "tracking.json").read_text()) == ids


def test_seeds_are_told_while_others_still_run(recipe_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that were there before, so that a process that was killed lost none."""
    told: list[tuple[str, int]] = []
    ran: list[int] = []

    class Recorder(Run):
        def log_child(self, name: str, metrics: Any, step: int, tags: Any) -> None:
            told.append((name, step))

    first = parallel.run

    def counted(job: Any, *rest: Any) -> Any:
        assert len(told) == len(ran), "a score waits until others are done"
        ran.append(job.seed)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return first(job, *rest)

    monkeypatch.setattr("infra.tracking.run.start_run", lambda *_: Recorder())
    monkeypatch.setattr(parallel, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        main(["--recipe", recipe_file, *CHANGES])
    assert told == [("teacher/SST-2", 0), ("teacher/SST-2", 1)]
    told.clear()
    ran.clear()
    monkeypatch.setattr(parallel, "run", first)
    assert main(["--recipe", recipe_file, *CHANGES]) == 0
    assert told == [(f"{model}/SST-2", seed) for model in ("teacher", "student") for seed in (0, 1)]


def test_mlflow_takes_the_metrics_of_any_row() -> None:
    from mlflow.utils.validation import _validate_metric_name

    content = report_content()
    names = ["a (D)", "owner/name@rev", "a+b"]
    row, latency = next(iter(content["rows"].values())), next(iter(content["latency_rows"].values()))
    content |= {"rows": dict.fromkeys(names, row), "latency_rows": {"a+b int8": latency}, "students": []}
    content["details"] = {names[0]: {"RTE": {"agreement": 0.5}}}
    metrics = tracked.numbers(content) | tracked.headline(content, {})
    assert {"a D/macro", "owner/name_rev/macro", "a_b/macro", "a D/RTE/agreement"} <= metrics.keys()
    for name in metrics:
        _validate_metric_name(name)


@pytest.mark.parametrize(
    ("settings", "data", "place"),
    [
        ({"name": "RTE"}, None, "hf://datasets/nyu-mll/glue"),
        ({"name": "RTE", "revision": "abc"}, None, "hf://datasets/nyu-mll/glue@abc"),
        (
            {
                "name": "own",
                "kind": "similarity",
                "hub": "a/b",
                "test": "test",
                "text": ("s", "t"),
                "label": "x",
            },
            None,
            "hf://datasets/a/b",
        ),
        (
            {"name": "own", "kind": "similarity", "test": "~/t.tsv", "text": ("s", "t"), "label": "x"},
            "ignored",
            "{home}/t.tsv",
        ),
    ],
)
def test_places_of_data(
    settings: dict[str, Any], data: str | None, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluation.sources.catalogue import find_tasks
    from evaluation.sources.loading import location_of
    from infra.settings.sections.task_settings import TaskSettings

    monkeypatch.setenv("HOME", str(tmp_path))
    (task,) = find_tasks([TaskSettings(**settings)])
    assert location_of(task, "test", data) == place.format(home=tmp_path)
