"""A user's mistakes through the real commands: one clear line, a telling exit code, nothing half made."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import UserError
from offline_teacher.main import main
from tests.conftest import ROOT
from tests.tiny_project import evaluation_command, make_project, run, student_command, teacher_command

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good recipe with a good teacher, through which nothing was run yet."""
    return make_project(tmp_path_factory.mktemp("good"), tracking={"enabled": False}).parent


@pytest.fixture
def recipe(project: Path, tmp_path: Path) -> Path:
    """The same in a directory of its own, to be spoiled."""
    shutil.copytree(project, tmp_path / "p")
    path = tmp_path / "p" / "recipe.yaml"
    path.write_text(path.read_text().replace(str(project), str(tmp_path / "p")))
    return path


def one_clear_line(ended: subprocess.CompletedProcess[str], *named: str) -> None:
    assert ended.returncode not in (0, 1), ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.stderr
    for words in named:
        assert words in errors[0]


def nothing_made(directory: Path) -> None:
    made = [path for path in (directory / "runs").rglob("*") if path.is_file()]
    assert not [path for path in made if path.suffix == ".arrow" or path.name == "manifest.json"], made


def nothing(directory: Path) -> None: ...


def empty_corpus(directory: Path) -> None:
    (directory / "train.txt").write_text("")
    (directory / "validation.txt").write_text("")


def no_weights(directory: Path) -> None:
    (directory / "teacher" / "model.safetensors").unlink()


def other_vocabulary(directory: Path) -> None:
    """The weights of a model with fewer tokens than the tokenizer has."""
    import json

    from safetensors.torch import load_file, save_file

    model = directory / "teacher"
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if "decoder" in name or "word_embeddings" in name or name == "cls.predictions.bias":
            weights[name] = weights[name][:500].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    assert config["vocab_size"] > 500
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))


Spoil = Callable[[Path], None]
TEACHER: dict[str, tuple[Spoil, list[str], list[str]]] = {
    "unknown key": (nothing, ["train.lerning_rate=1"], ["lerning_rate", "did you mean learning_rate?"]),
    "unknown section": (nothing, ["trian.seed=1"], ["trian", "train"]),
    "wrong type": (nothing, ["train.batch_size=many"], ["train.batch_size", "a whole number", "many"]),
    "no such files": (nothing, ["corpus.path={directory}/none/*.txt"], ["none/*.txt"]),
    "empty corpus": (empty_corpus, [], ["no "]),
    "no teacher": (nothing, ["teacher.model={directory}/none"], ["teacher.model", "none"]),
    "teacher without weights": (no_weights, [], ["teacher.model", "model.safetensors"]),
    "another vocabulary": (other_vocabulary, [], ["teacher.model", "500 rows", "vocabulary"]),
}


@pytest.mark.parametrize("name", TEACHER)
def test_teacher_pass(recipe: Path, name: str) -> None:
    spoil, overrides, named = TEACHER[name]
    spoil(recipe.parent)
    words = [override.replace("{directory}", str(recipe.parent)) for override in overrides]
    one_clear_line(run(teacher_command(recipe, *words)), *named)
    nothing_made(recipe.parent)


@pytest.mark.parametrize(
    ("output", "named"), [("{directory}/occupied/runs", "occupied"), ("/proc/runs", "/proc/runs")]
)
def test_output_that_cannot_be_written(
    recipe: Path, output: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first lies under a file. Both are refused before Ray starts, so no other process is needed."""
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    (recipe.parent / "occupied").write_text("")
    with pytest.raises(UserError, match=named) as caught:
        main(["run", "--recipe", str(recipe), f"output={output.format(directory=recipe.parent)}"])
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code not in (0, 1)
    nothing_made(recipe.parent)


@pytest.mark.parametrize(
    "command", [teacher_command, lambda r: student_command(r, ranks=0), evaluation_command]
)
def test_no_recipe(tmp_path: Path, command: Callable[[Path], list[str]]) -> None:
    one_clear_line(run(command(tmp_path / "absent.yaml")), "absent.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [lambda r: student_command(r, ranks=0), evaluation_command])
def test_the_stage_before_is_missing(recipe: Path, command: Callable[[Path], list[str]]) -> None:
    one_clear_line(run(command(recipe)), "runs/tiny/st")
    assert not (recipe.parent / "runs").exists()


def test_port_in_use(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["make", "-s", "-o", ".venv/installed", "ui", f"PORT={port}", f"RUNS={tmp_path}"]
        ended = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    one_clear_line(ended, f"port {port} is in use", "PORT=")
