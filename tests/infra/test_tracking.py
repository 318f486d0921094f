from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infra.redaction import redact
from infra.settings import sections
from infra.settings.recipe import Recipe
from infra.tracking import mlflow_sender
from infra.tracking.run import start_run

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

pytest.importorskip("mlflow")


def recipe(
    tmp_path: Path,
    name: str = "demo",
    uri: str | None = None,
    enabled: bool = True,
    system_metrics: bool = False,
) -> Recipe:
    return Recipe(
        name=name,
        output=str(tmp_path / "runs"),
        corpus=sections.Corpus(path=("texts/*.txt",)),
        teacher=sections.Teacher(model="teacher"),
        tracking=sections.Tracking(uri=uri, enabled=enabled, system_metrics=system_metrics),
    )


def client(tmp_path: Path) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def ids(tmp_path: Path, name: str = "demo") -> dict[str, str]:
    return json.loads((tmp_path / "runs" / name / "tracking.json").read_text())


def points(tmp_path: Path, key: str, stage: str = "student") -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in client(tmp_path).get_metric_history(ids(tmp_path)[stage], key)]


def test_nested_runs_params_files_store_and_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    store = tmp_path / "store"
    store.mkdir()
    with start_run(recipe(tmp_path), "teacher") as run:
        run.log_store(str(store), "xxh3-128:" + "ab" * 16)
    with start_run(recipe(tmp_path), "student") as run:
        run.log_metrics({"loss": 2.5, "learning_rate": 1e-4}, step=1)
        run.log_params({"hardware": "cpu"})
        run.register_model(str(model), "small", alias="best", tags={"kept": "0.97"})
    parent = client(tmp_path).get_run(ids(tmp_path)["parent"])
    assert parent.info.status == "FINISHED"  # no run of it goes on
    with start_run(recipe(tmp_path), "evaluation") as run:
        run.log_metrics({"CoLA": 0.5})
        run.log_artifact(str(model / "config.json"), "report")
    evaluation = ids(tmp_path)["evaluation"]
    assert run.run_id == evaluation

    server = client(tmp_path)
    parent = server.get_run(ids(tmp_path)["parent"])
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "demo"
    assert parent.data.params["masking.epochs"] == "1"
    for stage in ("teacher", "student", "evaluation"):
        child = server.get_run(ids(tmp_path)[stage])
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (child.info.run_name, child.info.status) == (stage, "FINISHED")
    student = server.get_run(ids(tmp_path)["student"])
    assert student.data.params["train.learning_rate"] == "0.0005"
    assert student.data.params["hardware"] == "cpu"
    assert student.data.metrics == {"loss": 2.5, "learning_rate": 1e-4}
    inputs = server.get_run(ids(tmp_path)["teacher"]).inputs
    assert inputs is not None
    dataset = inputs.dataset_inputs[0].dataset
    assert dataset.digest == "ab" * 16
    assert str(store) in dataset.source
    version = server.get_model_version_by_alias("small", "best")
    assert version.run_id == student.info.run_id
    assert version.tags.items() >= {"kept": "0.97"}.items()
    assert version.run_id is not None
    version_run = server.get_run(version.run_id)
    (logged,) = server.search_logged_models([version_run.info.experiment_id])
    assert version.source == f"models:/{logged.model_id}"
    assert logged.source_run_id == version.run_id
    assert [f.path for f in server.list_artifacts(evaluation, "report")] == ["report/config.json"]
    assert (tmp_path / "runs" / "mlartifacts").is_dir()
    assert not list((tmp_path / "runs" / "demo").glob("*.jsonl"))


def family(tmp_path: Path, uri: str | None = None) -> Recipe:
    """Two students of a store that is there already: no teacher pass is part of the recipe."""
    train = sections.Train()
    return dataclasses.replace(
        recipe(tmp_path, uri=uri),
        corpus=None,
        teacher=None,
        students={
            "half": sections.Variant(student=sections.Student(), train=train),
            "tiny": sections.Variant(
                student=sections.Student(layers=(0,)), train=dataclasses.replace(train, learning_rate=1e-3)
            ),
        },
    )


@pytest.mark.usefixtures("database")
def test_every_student_has_a_run_of_its_own(tmp_path: Path) -> None:
    of = family(tmp_path)
    for name in ("half", "tiny"):
        with start_run(of, "student", student=name) as run:
            run.log_metrics({"loss": float(len(name))}, 1)
    server, known = client(tmp_path), ids(tmp_path)
    assert known.keys() == {"uri", "parent", "student-half", "student-tiny"}
    parent, half, tiny = (server.get_run(known[key]) for key in ("parent", "student-half", "student-tiny"))
    assert [one.data.tags["mlflow.parentRunId"] for one in (half, tiny)] == [parent.info.run_id] * 2
    assert [one.data.tags["student"] for one in (half, tiny)] == ["half", "tiny"]
    assert [one.info.run_name for one in (half, tiny)] == ["student-half", "student-tiny"]
    assert [one.data.params["train.learning_rate"] for one in (half, tiny)] == ["0.0005", "0.001"]
    assert [one.data.params["student.layers"] for one in (half, tiny)] == ["every_second", "[0]"]
    assert parent.data.params["students"] == "['half', 'tiny']"
    assert not [name for name in parent.data.params if name.startswith(("train.", "student.", "teacher"))]
    assert points(tmp_path, "loss", "student-tiny") == [(1, 4.0)]
    assert parent.info.status == "FINISHED"  # no run of it goes on
    with start_run(of, "evaluation"):
        assert server.get_run(parent.info.run_id).info.status == "RUNNING"
    assert server.get_run(parent.info.run_id).info.status == "FINISHED"


@pytest.mark.usefixtures("database")
def test_one_student_is_resumed_and_its_failure_is_the_recipes(tmp_path: Path) -> None:
    of = family(tmp_path)
    with pytest.raises(KeyboardInterrupt), start_run(of, "student", student="tiny") as run:  # noqa: PT012
        run.log_metrics({"loss": 2.0}, 1)
        raise KeyboardInterrupt
    for stage, name in (("student", "half"), ("evaluation", None)):
        with start_run(of, stage, student=name):
            pass
    first = ids(tmp_path)
    assert client(tmp_path).get_run(first["parent"]).info.status == "FAILED"
    with start_run(of, "student", student="tiny") as run:
        run.log_metrics({"loss": 1.0}, 2)
    assert ids(tmp_path) == first
    assert points(tmp_path, "loss", "student-tiny") == [(1, 2.0), (2, 1.0)]
    assert client(tmp_path).get_run(first["parent"]).info.status == "FINISHED"


@pytest.mark.usefixtures("database")
def test_models_of_one_run_are_versions_of_their_own(tmp_path: Path) -> None:
    """The evaluation registers every student."""
    with start_run(family(tmp_path), "evaluation") as run:
        for name in ("half", "tiny"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(name)
            run.register_model(str(tmp_path / name), f"demo-{name}", scores={"macro": 0.5})
    server = client(tmp_path)
    for name in ("half", "tiny"):
        (version,) = server.search_model_versions(f"name = 'demo-{name}'")
        assert version.source is not None
        logged = server.get_logged_model(version.source.removeprefix("models:/"))
        assert [(metric.key, metric.value) for metric in logged.metrics or ()] == [("macro", 0.5)]
        files = Path(logged.artifact_location.removeprefix("file://"))
        assert (files / "artifacts/model/config.json").read_text() == name


@pytest.mark.usefixtures("database")
def test_the_alias_is_kept_by_the_better_model(tmp_path: Path) -> None:
    """Five students of five recipes; a score on other tasks, or a lower one, takes nothing."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    holders = []
    for number, (macro, tasks) in enumerate(
        [
            ("0.70", "CoLA,RTE"),
            ("0.65", "CoLA,RTE"),
            ("0.90", "RTE"),
            ("0.70", "CoLA,RTE"),
            ("0.8", "CoLA,RTE"),
        ]
    ):
        (model / "config.json").write_text(str(number))
        with start_run(recipe(tmp_path, f"recipe-{number}"), "evaluation") as run:
            tags = {"macro": macro, "tasks": tasks}
            run.register_model(str(model), "small", alias="best", tags=tags, score="macro")
        holders.append(client(tmp_path).get_model_version_by_alias("small", "best").version)
    assert [int(version) for version in holders] == [1, 1, 1, 4, 5]
    with start_run(recipe(tmp_path, "recipe-4"), "evaluation") as run:  # the holder itself, scored again
        tags = {"macro": "0.6", "tasks": "CoLA,RTE"}
        run.register_model(str(model), "small", alias="best", tags=tags, score="macro")
    holder = client(tmp_path).get_model_version_by_alias("small", "best")
    assert (int(holder.version), holder.tags["macro"]) == (5, "0.6")


@pytest.mark.usefixtures("database")
def test_a_resumed_run_repeats_no_point_and_changes_no_param(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), start_run(recipe(tmp_path), "student") as run:  # noqa: PT012
        run.log_params({"prefetch": 4, "world": 1})
        for step in range(1, 6):
            run.log_metrics({"loss": 1 / step}, step)
        raise KeyboardInterrupt
    first = ids(tmp_path)["student"]
    assert client(tmp_path).get_run(first).info.status == "FAILED"
    with start_run(recipe(tmp_path), "student") as run:
        run.log_params({"prefetch": 8, "world": 1})
        for step in range(3, 9):
            run.log_metrics({"loss": 1 / step}, step)
        for score in (0.5, 0.5, 0.75):
            run.log_metrics({"score": score})
    assert run.run_id == first
    assert points(tmp_path, "loss") == [(step, 1 / step) for step in range(1, 9)]
    assert points(tmp_path, "score") == [(0, 0.5), (0, 0.75)]
    data = client(tmp_path).get_run(first).data
    assert data.params["prefetch"] == "4"
    assert data.tags["resumed.prefetch"] == "8"
    assert "resumed.world" not in data.tags
    assert client(tmp_path).get_run(first).info.status == "FINISHED"


@pytest.mark.usefixtures("database")
def test_a_record_with_more_metrics_than_a_request_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    log_batch, sizes = MlflowClient.log_batch, []

    def counted(self: MlflowClient, run_id: str, **content: Any) -> None:
        sizes.append(len(content.get("metrics", ())))
        log_batch(self, run_id, **content)

    monkeypatch.setattr(mlflow_sender, "MAX_POINTS", 2)
    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    many = {f"score_{number}": number / 8 for number in range(5)}
    with start_run(recipe(tmp_path), "student") as run:
        run.log_metrics(many, 1)
        run.log_metrics({"loss": 0.5}, 1)
    metrics = client(tmp_path).get_run(ids(tmp_path)["student"]).data.metrics
    assert metrics == {**many, "loss": 0.5}
    assert max(sizes) == 2


@pytest.mark.parametrize("name", ["exp#2 b'c\"d ü[1];::&=x", "what? #%41"])
def test_all_files_lie_below_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    home, model = tmp_path / "home", tmp_path / "model"
    home.mkdir()
    model.mkdir()
    (model / "weights.txt").write_text("w")
    (home / name).mkdir()
    (home / name / "page #1?.txt").write_text("w")
    monkeypatch.chdir(home)
    for _ in range(2):
        with start_run(recipe(home / name), "student") as run:
            run.log_artifact(str(home / name / "page #1?.txt"), "report")
            run.register_model(str(model), "it's")
    assert {path.name for path in home.iterdir()} == {name}
    runs = home / name / "runs"
    assert {path.name for path in runs.iterdir()} == {"demo", "mlartifacts", "mlflow.db", "mlflow.db.lock"}
    assert len(list(runs.glob("mlartifacts/*/artifacts/report/page*"))) == 1
    assert len(list(runs.glob("mlartifacts/models/*/artifacts/artifacts/model/weights*"))) == 1
    with contextlib.closing(sqlite3.connect(runs / "mlflow.db")) as database:
        assert database.execute("select name, version from model_versions").fetchall() == [("it's", 1)]


def test_other_ranks_and_disabled_touch_nothing(tmp_path: Path) -> None:
    for run in (
        start_run(recipe(tmp_path), "student", rank=1),
        start_run(recipe(tmp_path, enabled=False), "student"),
    ):
        with run:
            run.log_params({"a": 1})
            run.log_metrics({"loss": 1.0}, 1)
            run.log_artifact("nothing")
            run.log_store("nothing", "digest")
            run.register_model("nothing", "name")
            assert run.run_id is None
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://bob:pa@ss@host:5000/x", "http://host:5000/x"),
        ("s3://bucket/a?X-Amz-Signature=abc&size=3", "s3://bucket/a?X-Amz-Signature=***&size=3"),
        ("failed at https://h/p?api_key=1#x, retry", "failed at https://h/p?api_key=***#x, retry"),
        ("plain text, a@b.c", "plain text, a@b.c"),
    ],
)
def test_secrets_are_stripped(text: str, clean: str) -> None:
    assert redact(text) == clean


@pytest.mark.usefixtures("database")
def test_secret_params_are_stripped(tmp_path: Path) -> None:
    with start_run(recipe(tmp_path), "student") as run:
        run.log_params({"remote": {"password": "x", "url": "ftp://u:p@h/d"}, "tokens": 7})
    data = client(tmp_path).get_run(ids(tmp_path)["student"]).data.params
    assert (data["remote.password"], data["remote.url"], data["tokens"]) == ("***", "ftp://h/d", "7")
