"""From text to report through the real commands (Ray, two DeepSpeed ranks, MLflow), killed or not; then two
students of the store that was made, with neither corpus nor teacher at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from infra.files import storage
from tests.conftest import ROOT
from tests.starts import HEAVY, loaded, rank_environment, start
from tests.tiny_project import (
    LENGTH,
    SECONDS,
    TASK,
    all_commands,
    evaluation_command,
    free_port,
    make_family,
    make_project,
    run,
    student_command,
    teacher_command,
)

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]
STAGES = ("teacher", "student", "evaluation")
STUDENT = "students/student"


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): storage.digest_file(str(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def times(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*")) if path.is_file()}


def score_times(evaluation: Path) -> dict[str, int]:
    """When each scored run was published; models of the seeds come and go until the median is known."""
    return {str(path): path.stat().st_mtime_ns for path in evaluation.glob("scores/*/*/seed-*.json")}


def scores(output: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> task -> metric."""
    rows = json.loads((output / "evaluation" / "report.json").read_text())["rows"]
    return {name: row["scores"] for name, row in rows.items()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a tiny project through which all three commands have gone, undisturbed."""
    path = make_project(tmp_path_factory.mktemp("project"))
    for command in all_commands(path):
        ended = run(command)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return path


@pytest.fixture(scope="module")
def output(recipe: Path) -> Path:
    return recipe.parent / "runs" / "tiny"


# --- what three commands leave ----------------------------------------------------------------------------


def test_the_store_is_sound(output: Path) -> None:
    from offline_teacher.store.store import open_store
    from offline_teacher.verification.verify import verify

    assert verify(str(output / "store")) == []
    store = open_store(str(output / "store"))
    assert store.splits.keys() == {"train", "validation"}
    assert store.splits["train"].plan.masking_epochs == 2
    assert store.layout.length == LENGTH
    assert store.layout.replay_layers == 1
    assert store.splits["train"].plan.samples > 2000


def test_the_model_directory_is_an_ordinary_one(output: Path) -> None:
    from transformers import AutoModelForMaskedLM, pipeline

    model = AutoModelForMaskedLM.from_pretrained(output / STUDENT / "model")
    assert model.config.n_layers == 1
    guesses = pipeline("fill-mask", model=str(output / STUDENT / "model"))("the dog was [MASK].")
    assert len(guesses) == 5
    assert all(0 < guess["score"] <= 1 for guess in guesses)


def test_the_student_learnt(output: Path) -> None:
    lines = [json.loads(line) for line in (output / STUDENT / "history.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, len(logged) + 1))
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_the_report_has_three_rows(output: Path) -> None:
    content = json.loads((output / "evaluation" / "report.json").read_text())
    rows = content["rows"]
    assert set(rows) == {"teacher", "student", "undistilled"}
    for row in rows.values():
        assert 0 <= row["scores"][TASK]["accuracy"] <= 1
        assert row["parameters"] > 0
        assert row["bytes"] > 0
    assert rows["student"]["parameters"] == rows["undistilled"]["parameters"] < rows["teacher"]["parameters"]
    assert (output / "evaluation" / "report.md").read_text().count("undistilled") >= 1
    assert list((output / "evaluation").glob("*.png"))


def test_every_stage_keeps_its_recipe(output: Path) -> None:
    from infra.settings.recipe_file import load_recipe

    recipes = [load_recipe(str(output / name / "recipe.yaml")) for name in ("store", STUDENT, "evaluation")]
    assert recipes[1] == recipes[2]
    masking = dataclasses.replace(recipes[1].masking, probability=0.15)  # decided by the teacher
    assert recipes[0] == dataclasses.replace(recipes[1], masking=masking)


def test_mlflow_has_one_parent_with_three_nested_runs(output: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output.parent}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "distillation"]
    runs = {one.info.run_id: one for one in client.search_runs([experiment.experiment_id])}
    ids = json.loads((output / "tracking.json").read_text())
    above = [one.data.tags.get("mlflow.parentRunId") for one in runs.values()]
    assert above.count(None) == 1
    assert above.count(ids["parent"]) == 3
    assert above.count(ids["evaluation"]) == len(above) - 4 > 0  # one for each model and task
    assert all(one.info.status == "FINISHED" for one in runs.values())
    for stage in STAGES:
        assert runs[ids[stage]].data.tags["mlflow.parentRunId"] == ids["parent"]
    steps = json.loads((output / STUDENT / "history.jsonl").read_text().splitlines()[-1])["step"]
    for name in ("loss", "kl", "mlm", "cosine", "learning_rate", "gradient_norm", "tokens_per_second"):
        points = client.get_metric_history(ids["student"], name)
        assert [point.step for point in points] == list(range(1, steps + 1)), name
    assert runs[ids["teacher"]].data.metrics["tokens_per_s"] > 0
    assert client.search_model_versions("name = 'tiny'")


def test_run_again_nothing_is_redone_and_nothing_heavy_is_loaded(
    recipe: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's command is also run as rank 1 of two, and ends without waiting for rank 0."""
    before = times(output)
    commands = teacher_command(recipe), student_command(recipe, ranks=0), evaluation_command(recipe)
    again = [start(command[1:]) for command in commands]
    for name, value in rank_environment(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    again.append(start(student_command(recipe, ranks=0)[1:]))
    for ended in again:
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert not loaded(ended) & HEAVY, ended.args
    after = times(output)
    made = ("store/", "students/", "evaluation/")
    for path, time_ns in before.items():
        name = str(Path(path).relative_to(output))
        if name.startswith(made) and not name.endswith("recipe.yaml"):
            assert after[path] == time_ns, name
    assert {path for path in after if Path(path).suffix != ".jsonl"} == {
        path for path in before if Path(path).suffix != ".jsonl"
    }


# --- more students of the store ---------------------------------------------------------------------------


def run_two_ranks(command: list[str]) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in (0, 1):
            environment = {**os.environ, **rank_environment(rank, 2, port)}
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.kill)
            ranks.append(process)
        with ThreadPoolExecutor(2) as pool:  # both pipes are read at once
            texts = list(pool.map(lambda process: process.communicate(timeout=SECONDS)[0], ranks))
        assert [process.returncode for process in ranks] == [0, 0], texts


@pytest.fixture(scope="module")
def family(recipe: Path, output: Path) -> Path:
    """What training and evaluation leave of a recipe of two students that names nothing but the store.

    The corpus and the teacher are moved out of the way while they run. No launcher starts the two ranks,
    which is quicker; the fixture ``recipe`` covers the launcher.
    """
    path = make_family(recipe)
    gone = [recipe.parent / name for name in ("teacher", "train.txt", "validation.txt")]
    for place in gone:
        place.rename(place.with_suffix(".gone"))
    try:
        run_two_ranks(student_command(path, ranks=0))
        ended = run(evaluation_command(path))
        assert ended.returncode == 0, ended.stdout + ended.stderr
    finally:
        for place in gone:
            place.with_suffix(".gone").rename(place)
    return output.parent / "family"


def test_a_student_among_several_is_the_one_that_is_trained_alone(family: Path, output: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        alone, among = (model / "model" / name for model in (output / STUDENT, family / "students/same"))
        assert alone.read_bytes() == among.read_bytes(), name


def test_a_student_of_relations_is_an_encoder(family: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(family / "students/narrow/model")
    assert (model.config.hidden_size, model.config.architectures) == (16, ["DistilBertModel"])
    lines = (family / "students/narrow/history.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "loss" in line]
    assert all(line["loss"] == line["relation"] for line in logged)
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_the_family_is_evaluated_whole(family: Path) -> None:
    content = json.loads((family / "evaluation" / "report.json").read_text())
    assert content["students"] == ["narrow", "same"]
    assert content["rows"].keys() == {"teacher", "narrow", "same", "undistilled narrow", "undistilled same"}
    for name in ("narrow", "same"):
        assert (family / f"evaluation/export/{name}/{TASK}/model.int8.onnx").exists()


def test_mlflow_has_a_run_of_every_student(family: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{family.parent}/mlflow.db")
    ids = json.loads((family / "tracking.json").read_text())
    assert client.get_run(ids["parent"]).info.status == "FINISHED"
    for name in ("narrow", "same"):
        run_of_student = client.get_run(ids[f"student-{name}"])
        assert run_of_student.data.tags["student"] == name
        (version,) = client.search_model_versions(f"name = 'family-{name}'")
        assert version.run_id == run_of_student.info.run_id
        assert client.get_model_version_by_alias(f"family-{name}", "best").version == version.version
        assert version.source is not None
        logged = client.get_logged_model(version.source.removeprefix("models:/"))
        assert {metric.key for metric in logged.metrics or ()} >= {"macro"}
        files = Path(logged.artifact_location.removeprefix("file://"))
        assert (files / "artifacts/model/model.safetensors").exists()


def test_a_family_run_again_loads_nothing_heavy(recipe: Path, family: Path) -> None:
    path = make_family(recipe)
    for command in (student_command(path, ranks=0), evaluation_command(path)):
        ended = start(command[1:])
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert not loaded(ended) & HEAVY, command


# --- killed in each stage ---------------------------------------------------------------------------------


def kill_when(command: list[str], condition: Callable[[], bool]) -> None:
    """SIGKILL to the command and all it started, as soon as the condition holds."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        deadline = time.monotonic() + SECONDS
        while not condition():
            if process.poll() is not None:
                assert process.stdout is not None
                pytest.fail("it ended before it could be killed:\n" + process.stdout.read().decode())
            assert time.monotonic() < deadline
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)  # leaves the processor to the command
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_in_each_stage_it_finishes_with_the_same_store(
    recipe: Path, output: Path, tmp_path: Path
) -> None:
    place = f"output={tmp_path}"
    store, student, evaluation = (tmp_path / "tiny" / name for name in ("store", STUDENT, "evaluation"))

    def some(directory: Path, pattern: str) -> Callable[[], bool]:
        return lambda: any(directory.glob(pattern))

    teacher = teacher_command(recipe, place)
    kill_when(teacher, some(store / "sequences", "*/part-*.json"))
    kill_when(teacher, some(store / "tasks", "*/*.json"))
    assert not (store / "manifest.json").exists()
    ended = run(teacher)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    undisturbed = {name: digest for name, digest in digests(output / "store").items() if "recipe" not in name}
    assert {name: digest for name, digest in digests(store).items() if "recipe" not in name} == undisturbed

    kill_when(student_command(recipe, place), some(student / "checkpoints", "step-*"))
    assert not (student / "model").exists()
    ended = run(student_command(recipe, place))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    finished = times(student)
    ended = run(student_command(recipe, place))  # the launcher, too, finds nothing to do
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert times(student) == finished
    model = f"{STUDENT}/model/model.safetensors"
    assert storage.digest_file(str(tmp_path / "tiny" / model)) == storage.digest_file(str(output / model))

    kill_when(evaluation_command(recipe, place), some(evaluation / "scores", "*/*/seed-*.json"))
    kept = score_times(evaluation)
    assert not (evaluation / "report.json").exists()
    ended = run(evaluation_command(recipe, place))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert kept.items() <= score_times(evaluation).items()
    assert scores(tmp_path / "tiny") == scores(output)
    shutil.rmtree(tmp_path / "tiny")
