"""What MLflow's users see of evaluated recipes: its pages in a browser, and a student that it serves."""

from __future__ import annotations

import dataclasses
import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.main import main
from infra.settings.sections import Student, Tracking
from infra.tracking.database import sqlite_uri
from offline_teacher.store.records import encode
from tests.evaluation.families import family_recipe, save_store
from tests.evaluation.web.browser import Missing, page_tests
from tests.evaluation.web.mlflow_pages import HEADLINE, mlflow_command, mlflow_ui, recipes, visit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tracking(
    encoder: str, headless_encoder: str, toy_data: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The tracking URI of two recipes of one store, evaluated, each with a student of its own."""
    base = tmp_path_factory.mktemp("compared")
    store = save_store(base / "store", encoder)
    for name, layer in (("lower", 0), ("upper", 1)):
        recipe = dataclasses.replace(
            family_recipe(base, store, data=toy_data, references=("random",)),
            name=name,
            students={},
            student=Student(layers=(layer,)),
            tracking=Tracking(system_metrics=False),
        )
        directory = Path(recipe.run("student").directory)
        shutil.copytree(headless_encoder, directory / "model")
        (directory / "model.json").write_bytes(encode({"results": {"validation": {"kl_t1": 0.25}}}))
        path = base / f"{name}.yaml"
        path.write_text(recipe.to_yaml())
        assert main(["--recipe", str(path)]) == 0
    return sqlite_uri(str(base / "runs/mlflow.db"))


def test_the_pages_show_the_metrics_that_compare_recipes(tracking: str) -> None:
    runs = recipes(tracking)
    assert {run.info.run_name for run in runs} == {"lower", "upper"}
    assert all(run.data.metrics.keys() >= set(HEADLINE) for run in runs)
    values = [json.dumps(run.data.metrics[name]).removesuffix(".0") for run in runs for name in HEADLINE]
    best = runs[0].data.metrics
    row = [f"{best['megabytes']:.1f} MB", f"{best['p50_ms']:.2f} ms", f"{100 * best['macro']:.1f} ["]
    expected = {
        "runs": [*HEADLINE, "lower", "upper", *values],
        "version": ["Version 1", "@\u00a0best", "gap closed", "undistilled", *row],
        "report": ["report.html", "report.json"],
        "parallel": ["Comparing 2 Runs", "student.layers", *HEADLINE],
    }
    try:
        page_tests()
    except Missing as problem:
        pytest.skip(str(problem))
    with mlflow_ui(tracking) as address:
        found = visit(address, runs, ["student.layers"], expected)
    assert {name: page["errors"] for name, page in found.items()} == dict.fromkeys(expected, [])


@pytest.fixture
def served(tracking: str) -> Iterator[str]:
    """The address of the best version of a student, served by MLflow."""
    model = ("--model-uri", "models:/upper@best", "--env-manager", "local", "--workers", "1")
    with mlflow_command("models", "serve", *model, tracking=tracking) as address:
        yield address


def test_a_served_student_gives_the_vectors_of_a_loaded_one(
    served: str, tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    texts = ["the film is fine", "a day", "", "the " * 60]
    found = asked(served, {"dataframe_split": {"columns": ["text"], "data": [[text] for text in texts]}})
    loaded = mlflow.pyfunc.load_model("models:/upper@best")
    expected = loaded.predict(pandas.DataFrame({"text": texts}))["vector"].tolist()
    assert [row["vector"] for row in found["predictions"]] == expected


def asked(address: str, content: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
