"""MLflow's own pages of evaluated recipes in headless Chromium: what they say, and pictures of them.

    python -m tests.evaluation.web.mlflow_pages RUNS PICTURES [PARAMETER ...]

RUNS is an output directory in which recipes are evaluated. PARAMETER is an axis of the parallel coordinates.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from infra.tracking.database import sqlite_uri
from tests.evaluation.web.browser import CHROMIUM, page_tests
from tests.s3_server import free_port, wait_for_port

SCRIPT = Path(__file__).with_name("mlflow_visit.mjs")
HEADLINE = ("macro", "retention", "gap_closed", "kl", "megabytes", "p50_ms")
"""Metrics of a recipe's own run that the pages have to show."""
COMPLETE = {"version": ["Tags"], "report": ["report.json"]}
"""Page -> texts that it shows once it is complete."""


def mlflow_ui(tracking: str) -> AbstractContextManager[str]:
    """Serves MLflow's pages of a database. Yields their address."""
    return mlflow_command("ui", "--workers", "1", "--backend-store-uri", tracking, tracking=tracking)


@contextmanager
def mlflow_command(*arguments: str, tracking: str) -> Iterator[str]:
    """The address of a server that ``mlflow`` starts with these arguments, on loopback."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # six processes more, which no page needs
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for_port(port, process, 300)
        address = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{address}/health", timeout=300) as answer:
            assert answer.status == 200
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def recipes(tracking: str) -> list[Any]:
    """MLflow's runs of the evaluated recipes, the best first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking)
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(experiments, order_by=["metrics.macro DESC"])
    return [run for run in found if "mlflow.parentRunId" not in run.data.tags and "macro" in run.data.metrics]


def visit(
    address: str,
    runs: Sequence[Any],
    parameters: Sequence[str] = (),
    expected: dict[str, list[str]] | None = None,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Text and errors of each page that ``mlflow_visit.mjs`` opens. A page is complete when it shows what is
    expected.

    ``runs``: those of recipes. The page of a model version is that of version 1 of the first recipe's
    student. Raises Missing without a browser.
    """
    asked = {
        "experiment": runs[0].info.experiment_id,
        "runs": [run.info.run_id for run in runs],
        "parameters": parameters,
        "metrics": [name for name in HEADLINE if all(name in run.data.metrics for run in runs)],
        "model": runs[0].info.run_name,
        "version": 1,
        "expected": expected or COMPLETE,
    }
    command = ["node", str(SCRIPT), address, str(CHROMIUM), json.dumps(asked)]
    command += [str(pictures.absolute())] if pictures else []
    done = subprocess.run(command, cwd=page_tests(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(output: str, pictures: str, *parameters: str) -> None:
    tracking = sqlite_uri(os.path.join(os.path.abspath(output), "mlflow.db"))
    Path(pictures).mkdir(parents=True, exist_ok=True)
    with mlflow_ui(tracking) as address:
        found = visit(address, recipes(tracking), parameters, pictures=Path(pictures))
    for name, page in found.items():
        print(f"{pictures}/{name}.png", *page["errors"], sep="\n  ")


if __name__ == "__main__":
    main(*sys.argv[1:])
