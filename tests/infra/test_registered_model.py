"""A registered student is one that MLflow loads and runs, once for the same weights."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import mlflow
import numpy as np
import pandas
import pytest
import torch

from infra.tracking import registered_model
from infra.tracking.database import sqlite_uri
from infra.tracking.mlflow_sender import ARTIFACTS_PLACEHOLDER
from infra.tracking.registered_model import EXAMPLE
from infra.tracking.run import start_run
from tests.evaluation.conftest import save_encoder, save_roberta
from tests.infra.test_tracking import client, family, recipe

TEXTS = ["the film is fine", "a day"]


@pytest.fixture(params=["bert", "roberta"])
def student(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    if request.param == "bert":
        return save_encoder(tmp_path / "model")
    return save_roberta(tmp_path / "model", positions=34)


def expected(directory: str, text: str) -> np.ndarray:
    """Mean of the last hidden states of one text, alone."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(directory).eval()
    length = 33 if model.config.model_type == "roberta" else 512
    inputs = AutoTokenizer.from_pretrained(directory)(
        text, return_tensors="pt", return_token_type_ids=False, truncation=True, max_length=length
    )
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0].mean(dim=0).numpy()


@pytest.mark.usefixtures("database")
def test_a_version_loads_and_answers(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_run(recipe(tmp_path), "student") as run:
        run.register_model(student, "small", alias="best", note="| a | b |")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(str(tmp_path / "runs/mlflow.db")))
    model = mlflow.pyfunc.load_model("models:/small@best")
    texts = [*TEXTS, " ".join(["the"] * 60)]
    found = model.predict(pandas.DataFrame({"text": texts}))["vector"]
    for text, vector in zip(texts, found, strict=True):
        np.testing.assert_allclose(vector, expected(student, text), atol=1e-5)
    assert model.metadata.signature.inputs.input_names() == ["text"]
    assert model.input_example["text"].tolist() == [EXAMPLE]
    version = client(tmp_path).get_model_version_by_alias("small", "best")
    assert version.description == "| a | b |"


@pytest.mark.usefixtures("database")
def test_training_and_evaluation_make_one_version(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model")
    of = family(tmp_path)
    with start_run(of, "student", student="tiny") as run:
        run.register_model(model, "small", tags={"store": "xxh3:1"})
    with start_run(of, "evaluation") as run:
        run.register_model(
            model, "small", alias="best", tags={"macro": "0.5", "tasks": "RTE"}, score="macro",
            scores={"macro": 0.5, "score/RTE": 0.5}, note="evaluated",
        )  # fmt: skip
    server = client(tmp_path)
    (version,) = server.search_model_versions("name = 'small'")
    assert version.tags.items() >= {"store": "xxh3:1", "macro": "0.5"}.items()
    assert version.description == "evaluated"
    assert version.run_id is not None
    (logged,) = server.search_logged_models([server.get_run(version.run_id).info.experiment_id])
    assert {metric.key: metric.value for metric in logged.metrics or ()} == {"macro": 0.5, "score/RTE": 0.5}
    save_roberta(tmp_path / "model", positions=34)  # trained again: other weights
    with start_run(of, "student", student="tiny") as run:
        run.register_model(model, "small")
    assert len(server.search_model_versions("name = 'small'")) == 2


@pytest.mark.usefixtures("database")
def test_the_recipes_run_has_the_headline(tmp_path: Path) -> None:
    from tests.infra.test_tracking import ids

    with start_run(recipe(tmp_path), "evaluation") as run:
        note = f"see http://bob:pw@host/report.html or [it]({ARTIFACTS_PLACEHOLDER}a.html)"
        run.log_headline({"macro": 0.5, "tiny/macro": 0.4}, note)
        run.log_dataset("RTE dev", "nyu-mll/glue", "xxh3-128:" + "0" * 32)
        for seed in (0, 1):
            run.log_child("student/RTE", {"score": 0.5 + seed}, seed, {"task": "RTE"})
    server, known = client(tmp_path), ids(tmp_path)
    parent, evaluation = server.get_run(known["parent"]), server.get_run(known["evaluation"])
    assert parent.data.metrics == {"macro": 0.5, "tiny/macro": 0.4}
    page = f"#/experiments/{parent.info.experiment_id}/runs/{known['evaluation']}/artifacts/a.html"
    assert parent.data.tags["mlflow.note.content"] == f"see http://host/report.html or [it]({page})"
    assert parent.data.tags.keys() >= {"mlflow.user", "mlflow.source.name"}
    assert evaluation.inputs is not None
    (given,) = evaluation.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("RTE dev", "0" * 32)
    child = server.get_run(known["evaluation/student/RTE"])
    assert child.data.tags["mlflow.parentRunId"] == evaluation.info.run_id
    assert child.data.tags["task"] == "RTE"
    assert child.info.status == "FINISHED"
    history = server.get_metric_history(child.info.run_id, "score")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (1, 1.5)]


@pytest.mark.usefixtures("database")
def test_a_remote_file_is_an_artifact(bucket: str, tmp_path: Path) -> None:
    from infra.files import storage
    from tests.infra.test_tracking import ids

    storage.publish_bytes(storage.join(bucket, "evaluation/report.html"), b"<p>")
    with start_run(recipe(tmp_path), "evaluation") as run:
        run.log_artifact(storage.join(bucket, "evaluation/report.html"), "evaluation")
    server = client(tmp_path)
    found = server.list_artifacts(ids(tmp_path)["evaluation"], "evaluation")
    assert [file.path for file in found] == ["evaluation/report.html"]
    local = server.download_artifacts(ids(tmp_path)["evaluation"], found[0].path, str(tmp_path))
    assert Path(local).read_bytes() == b"<p>"


@pytest.mark.usefixtures("database")
def test_system_metrics_start_with_the_run(tmp_path: Path) -> None:
    """Their steps are seconds of the run."""
    from tests.infra.test_tracking import points

    with start_run(recipe(tmp_path, system_metrics=True), "student"):
        pass
    for name in ("cpu_utilization_percentage", "disk_usage_percentage", "network_receive_megabytes"):
        ((step, _),) = points(tmp_path, f"system/{name}")
        assert 0 <= step < 60


def test_loading_the_served_model_gives_no_warning() -> None:
    """A thread registers the model. All threads share the filters of warnings, so a filter may be gone."""
    assert mlflow.pyfunc.FLAVOR_NAME  # imported first, because its import warns
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(str(registered_model.CODE))
    assert [str(one.message) for one in caught] == []
