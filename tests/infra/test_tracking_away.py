"""A tracking server that is away, answers late, or refuses: the run goes on, and the server catches up."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from infra.tracking import run as tracking_run
from infra.tracking.mlflow_sender import RunSender
from infra.tracking.run import start_run
from tests.infra.test_tracking import client, family, ids, points, recipe

pytest.importorskip("mlflow")


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.usefixtures("database")
def test_a_server_that_is_away_costs_one_line_and_is_caught_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = f"http://bob:hunter2@127.0.0.1:{closed_port()}"
    with start_run(recipe(tmp_path, uri=away), "student") as run:
        assert run.run_id is None
        for step in range(1, 4):
            run.log_metrics({"loss": step}, step)
        run.register_model(str(tmp_path / "nothing"), "small")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "were not sent" in said
    assert "tracking-student.jsonl" in said
    assert "hunter2" not in said
    journal = tmp_path / "runs" / "demo" / "tracking-student.jsonl"
    assert "hunter2" not in journal.read_text()
    assert len(journal.read_text().splitlines()) == 7

    with journal.open("a") as file:
        file.write('{"metrics": {"lo')  # a kill in the middle of a write
    with start_run(recipe(tmp_path), "evaluation"):  # any stage catches up for the others
        pass
    assert points(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert not journal.exists()
    with start_run(recipe(tmp_path), "student") as run:
        run.log_metrics({"loss": 4}, 4)
    assert points(tmp_path, "loss")[3:] == [(4, 4.0)]


@pytest.mark.usefixtures("database")
def test_a_server_that_has_answered_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows the experiment, and then takes longer for the runs than a server that is away may take."""
    with start_run(recipe(tmp_path), "teacher"):
        pass
    find_runs, never = RunSender._find_runs, threading.Event()

    def slowly(self: RunSender, *arguments: Any) -> None:
        never.wait(1.5 * away)
        find_runs(self, *arguments)

    away = 3.0
    monkeypatch.setattr(tracking_run, "_UNREACHABLE_SECONDS", away)
    monkeypatch.setattr(tracking_run, "_START_SECONDS", 0.0)
    monkeypatch.setattr(RunSender, "is_sqlite", False)
    monkeypatch.setattr(RunSender, "_find_runs", slowly)
    with start_run(recipe(tmp_path), "student") as run:
        run.log_metrics({"loss": 1.0}, 1)
    assert points(tmp_path, "loss") == [(1, 1.0)]


@pytest.mark.usefixtures("database")
def test_a_student_catches_up_for_another(tmp_path: Path) -> None:
    away = family(tmp_path, uri=f"http://127.0.0.1:{closed_port()}")
    with start_run(away, "student", student="half") as run:
        run.log_metrics({"loss": 3.0}, 1)
    assert (tmp_path / "runs/demo/tracking-student-half.jsonl").exists()
    with start_run(family(tmp_path), "student", student="tiny") as run:
        pass
    assert points(tmp_path, "loss", "student-half") == [(1, 3.0)]
    assert not list((tmp_path / "runs/demo").glob("*.jsonl"))


def test_a_database_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    """It takes the connection and is silent, in a process that has to end. MLflow alone tries for minutes.
    The run waits for seconds only, because nothing will come however long it waits."""
    pytest.importorskip("psycopg2")
    text = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_tracking
from infra.tracking import run as tracking_run
tracking_run._START_SECONDS, tracking_run._UNREACHABLE_SECONDS = 1.0, 2.0
recipe = test_tracking.recipe(Path(sys.argv[1]), uri=sys.argv[2])
with test_tracking.start_run(recipe, "student") as run:
    run.log_metrics({"loss": 1.0}, 1)
print("ended", run.run_id)
"""
    here = Path(__file__).parent
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"postgresql+psycopg2://user@127.0.0.1:{silent.getsockname()[1]}/runs"
        done = subprocess.run(
            [sys.executable, "-c", text, str(tmp_path), uri, str(here)],
            cwd=here.parents[1],
            env={"PYTHONPATH": str(here.parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.stdout == "ended None\n", done.stderr
    assert "tracking: 4 records were not sent" in done.stderr
    assert done.stderr.count("\n") == 1
    kept = (tmp_path / "runs/demo/tracking-student.jsonl").read_text().splitlines()
    assert [next(iter(json.loads(line))) for line in kept] == ["status", "params", "metrics", "status"]


@pytest.mark.usefixtures("database")
def test_points_that_arrived_unnoticed_are_not_sent_twice(tmp_path: Path) -> None:
    """A kill between the answer of the server and the emptying of the journal."""
    with start_run(recipe(tmp_path), "student") as run:
        run.log_metrics({"loss": 1.0}, 1)
    journal = tmp_path / "runs" / "demo" / "tracking-student.jsonl"
    lines = [{"metrics": {"loss": float(s)}, "step": s, "time": 1} for s in (1, 2)]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with start_run(recipe(tmp_path), "student"):
        pass
    assert sorted(points(tmp_path, "loss")) == [(1, 1.0), (2, 2.0)]


@pytest.mark.usefixtures("database")
def test_what_the_server_refuses_is_said_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with start_run(recipe(tmp_path), "student") as run:
        run.log_metrics({"bad\nname": 1.0}, 1)
        run.log_artifact(str(tmp_path / "missing.png"))
        run.log_metrics({"loss": 1.0}, 1)
    assert points(tmp_path, "loss") == [(1, 1.0)]
    assert capsys.readouterr().err.count("\n") == 1


def test_a_server_that_can_store_no_files_gets_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files stay in the journal. A later start sends them, and creates no run."""
    from mlflow import MlflowClient

    def fails(*_: object) -> None:
        raise OSError("no credentials")

    (tmp_path / "plot.png").write_bytes(b"picture")
    with monkeypatch.context() as broken:
        for name in ("log_artifact", "log_text"):
            broken.setattr(MlflowClient, name, fails)
        with start_run(recipe(tmp_path), "student") as run:
            run.log_artifact(str(tmp_path / "plot.png"))
            run.log_metrics({"loss": 1.0}, 1)
    assert points(tmp_path, "loss") == [(1, 1.0)]
    assert "1 records were not sent (no credentials)" in capsys.readouterr().err
    before = ids(tmp_path)
    server = client(tmp_path)
    assert server.get_run(before["student"]).info.status == "FINISHED"
    with start_run(recipe(tmp_path), "student"):
        pass
    assert ids(tmp_path) == before
    assert len(server.search_runs(["1"])) == 2
    assert [file.path for file in server.list_artifacts(before["student"])] == ["plot.png"]
    assert [file.path for file in server.list_artifacts(before["parent"])] == ["recipe.yaml"]
    assert "recipe.yaml" in server.get_run(before["parent"]).data.tags  # so it is not stored again


def test_processes_starting_at_once_on_a_fresh_database(tmp_path: Path) -> None:
    text = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_tracking
with test_tracking.start_run(test_tracking.recipe(Path(sys.argv[1]), sys.argv[2]), "student") as run:
    run.log_metrics({"loss": 1.0}, 1)
assert run.run_id
"""
    here = Path(__file__).parent
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", text, str(tmp_path), f"recipe-{number}", str(here)],
            cwd=here.parents[1],
            env={"PYTHONPATH": str(here.parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for number, process in enumerate(processes):
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
        run = client(tmp_path).get_run(ids(tmp_path, f"recipe-{number}")["student"])
        assert run.data.metrics == {"loss": 1.0}
        assert run.info.status == "FINISHED"
    assert len(client(tmp_path).search_experiments()) == 2
