"""Tracking through PostgreSQL, an S3 server and ``mlflow server``, all real, and all of them failing once."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.settings import sections
from infra.settings.recipe import Recipe
from infra.tracking.run import start_run
from tests.s3_server import free_port, s3_server, wait_for_port
from tests.services.postgres import Postgres, available

pytest.importorskip("psycopg2")
pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not available(), reason="PostgreSQL is not installed (apt-get install postgresql)"),
]


class Server:
    """``mlflow server`` on one port, started and stopped at will."""

    def __init__(self, backend: str, directory: Path) -> None:
        self.port, self.log = free_port(), directory / "mlflow.log"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", backend, "--serve-artifacts"),
            *("--artifacts-destination", "s3://mlflow/artifacts"),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        wait_for_port(self.port, self.process, 300)
        with urllib.request.urlopen(
            f"{self.uri}/health", timeout=300
        ) as answer:  # it listens before it is ready
            assert answer.status == 200

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, 15)
            self.process.wait()


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Postgres, Server]]:
    import boto3

    directory = tmp_path_factory.mktemp("services")
    with pytest.MonkeyPatch.context() as patch, s3_server() as s3:
        environment = {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": s3, "MLFLOW_S3_ENDPOINT_URL": s3,
        }  # fmt: skip
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="mlflow")
        with contextlib.ExitStack() as started:
            postgres = Postgres(directory / "postgres")
            started.callback(postgres.stop)
            server = Server(postgres.uri, directory)
            started.callback(server.stop)
            server.start()
            yield postgres, server


def recipe(tmp_path: Path, server: Server, name: str) -> Recipe:
    return Recipe(
        name=name,
        output=str(tmp_path / "runs"),
        corpus=sections.Corpus(path=("a.txt",)),
        teacher=sections.Teacher(model="teacher"),
        tracking=sections.Tracking(uri=server.uri, system_metrics=False),
    )


def points(server: Server, tmp_path: Path, name: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    run_id = json.loads((tmp_path / "runs" / name / "tracking.json").read_text())["student"]
    history = MlflowClient(tracking_uri=server.uri).get_metric_history(run_id, "loss")
    return sorted((point.step, point.value) for point in history)


def test_a_run_is_tracked_in_the_database_and_its_files_lie_on_s3(
    services: tuple[Postgres, Server], tmp_path: Path
) -> None:
    import boto3

    _, server = services
    report = tmp_path / "report.md"
    report.write_text("# report\n")
    with start_run(recipe(tmp_path, server, "whole"), "student") as run:
        for step in range(3):
            run.log_metrics({"loss": 1.0 / (step + 1)}, step)
        run.log_artifact(str(report), "evaluation")
    assert points(server, tmp_path, "whole") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    keys = [item["Key"] for item in boto3.client("s3").list_objects_v2(Bucket="mlflow")["Contents"]]
    assert any(key.endswith("evaluation/report.md") for key in keys)


def test_database_down_in_mid_run_loses_no_point(services: tuple[Postgres, Server], tmp_path: Path) -> None:
    postgres, server = services
    with start_run(recipe(tmp_path, server, "database"), "student") as run:
        run.log_metrics({"loss": 3.0}, 1)
        postgres.stop()
        run.log_metrics({"loss": 2.0}, 2)
        postgres.start()
        run.log_metrics({"loss": 1.0}, 3)
    with start_run(recipe(tmp_path, server, "database"), "student"):
        pass  # catches up with what the run's own end may still have met
    assert points(server, tmp_path, "database") == [(1, 3.0), (2, 2.0), (3, 1.0)]


@pytest.mark.slow
def test_server_restarted_in_mid_run_loses_no_point(
    services: tuple[Postgres, Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, server = services
    with start_run(recipe(tmp_path, server, "restart"), "student") as run:
        run.log_metrics({"loss": 2.0}, 1)
        server.stop()
        run.log_metrics({"loss": 1.0}, 2)
    assert "tracking" in capsys.readouterr().err
    server.start()
    with start_run(recipe(tmp_path, server, "restart"), "student"):
        pass
    assert points(server, tmp_path, "restart") == [(1, 2.0), (2, 1.0)]
