"""Several ``--model``: one report, names of one's own, MLflow, and what can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from evaluation.main import main
from infra.errors import UserError
from infra.files import storage
from tests.evaluation.conftest import QUICK
from tests.evaluation.test_evaluation_main import told_without_torch
from tests.evaluation.test_tracked import client, points


def command(data: str, output: Path, *models: str) -> list[str]:
    given = [part for model in models for part in ("--model", model)]
    rest = ["--tasks", "SST-2", "--data", data, "--output", str(output), "--max-steps", "1"]
    return [*given, *rest, "--batch-size", "4", *QUICK]


@pytest.fixture
def hub(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that holds one model; the names asked for."""
    asked: list[str] = []

    def download(name: str, revision: str | None, **options: object) -> str:
        asked.append(f"{name}@{revision}")
        place = tmp_path / f"hub/{len(asked)}"  # another directory each time
        shutil.copytree(encoder, place)
        return str(place)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def test_models_of_every_place_are_rows_of_one_report(
    encoder: str, pooler_free_encoder: str, toy_data: str, bucket: str, hub: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for path in Path(encoder).iterdir():
        storage.publish_bytes(storage.join(bucket, "far", path.name), path.read_bytes())
    models = [pooler_free_encoder, "stock=someone/tiny-bert@v1", f"remote={bucket}/far"]
    asked = command(toy_data, tmp_path / "out", *models)
    assert main(asked) == 0
    shown = capsys.readouterr().out
    names = [Path(pooler_free_encoder).name, "stock", "remote"]
    content = json.loads((tmp_path / "out/report.json").read_text())
    assert list(json.loads((tmp_path / "out/scores.json").read_text())) == sorted(names)
    assert content["rows"].keys() == set(names)
    assert content["students"] == []
    assert all(content["rows"][name]["latency"]["p50_ms"] > 0 for name in names)
    assert content["rows"]["stock"]["scores"] == content["rows"]["remote"]["scores"]  # the same weights
    assert hub == ["someone/tiny-bert@v1"]
    header = next(line for line in shown.splitlines() if line.startswith("task"))
    assert header.split()[2:] == names
    page = (tmp_path / "out/report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in names)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/scores").rglob("*")}
    assert main(asked) == 0
    assert "rows/s" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/scores").rglob("*")} == before
    assert json.loads((tmp_path / "out/report.json").read_text()) == content  # its timings too


def test_one_more_model_runs_alone(
    encoder: str, pooler_free_encoder: str, toy_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(toy_data, tmp_path, f"teacher={encoder}")) == 0
    capsys.readouterr()
    both = command(toy_data, tmp_path, f"teacher={encoder}", f"small={pooler_free_encoder}")
    assert main(both) == 0
    assert "teacher" not in capsys.readouterr().err
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert list(rows) == ["small", "teacher"]
    assert rows["small"]["retention"] == pytest.approx(rows["small"]["macro"] / rows["teacher"]["macro"])
    told_without_torch(both)


def test_every_model_learns_from_the_teacher(
    encoder: str, pooler_free_encoder: str, toy_data: str, tmp_path: Path
) -> None:
    models = [f"one={pooler_free_encoder}", f"two={encoder}"]
    assert main([*command(toy_data, tmp_path, *models), "--teacher", encoder]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert rows.keys() == {"teacher", "one", "two", "one (D)", "two (D)"}
    assert rows["one (D)"]["latency"] == rows["one"]["latency"] != rows["two"]["latency"]


def test_they_are_tracked(
    encoder: str, pooler_free_encoder: str, toy_data: str, empty_database: Path, tmp_path: Path
) -> None:
    output = tmp_path / "an output"
    output.mkdir()
    shutil.copy(empty_database, output / "mlflow.db")
    asked = command(toy_data, output, f"big={encoder}", f"small={pooler_free_encoder}")
    asked[asked.index("off")] = f"sqlite:///{output}/mlflow.db"
    assert main(asked) == 0
    ids = json.loads((output / "tracking.json").read_text())
    content = json.loads((output / "report.json").read_text())
    server = client(output)
    parent, run = server.get_run(ids["parent"]), server.get_run(ids["evaluation"])
    assert parent.info.run_name == "anoutput"
    assert {parent.info.status, run.info.status} == {"FINISHED"}
    for name in ("big", "small"):
        assert parent.data.metrics[f"{name}/macro"] == content["rows"][name]["macro"]
        scores = points(server, ids[f"evaluation/{name}/SST-2"], "score")
        assert scores == [(0, content["rows"][name]["scores"]["SST-2"]["score"])]
    files = {file.path for file in server.list_artifacts(ids["evaluation"], "evaluation")}
    assert files >= {"evaluation/report.html", "evaluation/report.json"}
    assert len(run.inputs.dataset_inputs) == 2
    assert not server.search_registered_models()


# the models given, what the one line must say
WRONG = [
    (["a={model}", "a={other}"], "--model: a is the name of two models; write another name before the ="),
    (["a b={model}"], "--model: a name is letters, digits, dots, dashes and underscores, not 'a b'"),
    (["={model}"], "--model: a name is letters, digits, dots, dashes and underscores, not ''"),
    (["-x={model}"], "not '-x'; write --model NAME=DIR"),
    (["a="], "--model: a= names no model; write --model a=DIR"),
    (["a=./nowhere"], "./nowhere: no such model directory"),
    (["{model}", "b=nowhere"], "nowhere: no such model directory; a model of the hub is written owner/name"),
    (["a={data}"], "no config.json; this is not a model directory"),
    (["{model}", ""], "no such model directory"),
    (["a=ftp://host/model"], "ftp://"),
    (["a=s3://me:secret@bucket/model"], "--model: holds a password"),
]


@pytest.mark.parametrize(("models", "says"), WRONG, ids=[says for _, says in WRONG])
def test_wrong_models(
    encoder: str, pooler_free_encoder: str, toy_data: str, tmp_path: Path, models: list[str], says: str
) -> None:
    places = {"model": encoder, "other": pooler_free_encoder, "data": toy_data}
    given = [f"--model={model.format(**places)}" for model in models]
    with pytest.raises(UserError) as caught:
        main([*given, *command(toy_data, tmp_path / "out")])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_secret_in_the_place_of_tracking(encoder: str, toy_data: str, tmp_path: Path) -> None:
    arguments = [*command(toy_data, tmp_path / "out", encoder), "--tracking", "https://me:secret@host"]
    with pytest.raises(UserError, match="--tracking: holds a password; settings are saved"):
        main(arguments)
    assert not (tmp_path / "out").exists()


def test_a_name_stays_its_models(
    encoder: str, pooler_free_encoder: str, toy_data: str, tmp_path: Path
) -> None:
    assert main(command(toy_data, tmp_path, f"a={encoder}")) == 0
    with pytest.raises(UserError, match=f"scores in a belong to {encoder}, not to {pooler_free_encoder}"):
        main(command(toy_data, tmp_path, f"a={pooler_free_encoder}"))


def test_the_row_of_the_teacher_is_taken(encoder: str, toy_data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="teacher is the name of two models"):
        main([*command(toy_data, tmp_path, f"teacher={encoder}"), "--teacher", encoder])


def test_a_path_may_hold_what_separates_a_name(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(encoder, tmp_path / "a=b")
    monkeypatch.chdir(tmp_path)
    assert main(command(toy_data, tmp_path / "out", "a=b")) == 0
    assert json.loads((tmp_path / "out/scores.json").read_text()).keys() == {"a=b"}
