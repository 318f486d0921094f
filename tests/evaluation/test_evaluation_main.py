"""The command as a user types it, right and wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.main import main
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.files import storage
from infra.settings.recipe_file import load_recipe
from tests.evaluation.conftest import QUICK
from tests.evaluation.families import family_recipe, save_store
from tests.starts import COMMANDS, HEAVY, loaded, start


def told_without_torch(command: list[str]) -> None:
    """The command has nothing left to do, and says so without loading anything heavy."""
    ended = start([*COMMANDS["evaluation"], *command])
    assert ended.returncode == 0, ended.stderr
    assert "rows/s" not in ended.stderr
    assert not loaded(ended) & HEAVY


def test_any_model_directory(
    encoder: str, toy_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", encoder, "--tasks", "SST-2", "--data", toy_data, "--output", str(tmp_path)]
    command += ["--seeds", "2", "--epochs", "0.2", "--learning-rate", "0.003", *QUICK]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "SST-2   accuracy" in first.out
    assert "(D)" not in first.out
    assert "rows/s" in first.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    name = os.path.basename(encoder)
    assert scores[name]["SST-2"].keys() == {"accuracy", "score"}
    assert (tmp_path / f"scores/{name}/SST-2/seed-1.json").exists()
    told_without_torch(command)


def test_a_teacher_adds_a_second_distillation(
    encoder: str, pooler_free_encoder: str, toy_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", pooler_free_encoder, "--teacher", encoder, "--temperature", "3", "--tasks", "SST-2"]
    command += ["--data", toy_data, "--output", str(tmp_path), "--epochs", "0.2", *QUICK]
    assert main(command) == 0
    name = os.path.basename(pooler_free_encoder)
    assert f"{name} (D)" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores.keys() == {"teacher", name, f"{name} (D)"}
    kept = json.loads((tmp_path / f"scores/{name} (D)/SST-2/seed-0.json").read_text())
    assert kept["key"]["temperature"] == 3.0


def score(model: str | Path, data: str, output: Path, *more: str) -> None:
    arguments = ["--model", str(model), "--tasks", "SST-2", "--data", data, "--output", str(output)]
    assert main([*arguments, "--max-steps", "1", "--batch-size", "4", *QUICK, *more]) == 0


def test_students_of_the_same_last_name_keep_their_own_scores(
    encoder: str, toy_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    students = [tmp_path / name / "students/student/model" for name in ("one", "two", "runs/two")]
    output = tmp_path / "out"
    for number, student in enumerate(students):
        shutil.copytree(encoder, student)
        edit_config(student, layer_norm_eps=10.0**-number)
        score(student, toy_data, output)
    names = ["one", "two", "runs-two"]
    kept = {name: (output / f"scores/{name}/SST-2/seed-0.json").read_bytes() for name in names}
    assert json.loads((output / "scores.json").read_text()).keys() == set(names)
    capsys.readouterr()
    for student in students:
        score(student, toy_data, output)
    assert "rows/s" not in capsys.readouterr().err  # each is found again under its own name
    assert kept == {name: (output / f"scores/{name}/SST-2/seed-0.json").read_bytes() for name in names}


def test_another_teacher_needs_another_output(
    encoder: str, pooler_free_encoder: str, toy_data: str, tmp_path: Path
) -> None:
    score(pooler_free_encoder, toy_data, tmp_path / "out", "--teacher", encoder)
    shutil.copytree(encoder, tmp_path / "teacher")
    with pytest.raises(
        UserError, match=rf"teacher belong to {encoder}, not to {tmp_path}/teacher; give another"
    ):
        score(pooler_free_encoder, toy_data, tmp_path / "out", "--teacher", str(tmp_path / "teacher"))
    score(tmp_path / "teacher", toy_data, tmp_path / "other", "--teacher", encoder)
    scores = json.loads((tmp_path / "other/scores.json").read_text())
    name = f"{tmp_path.name}-teacher"
    assert scores.keys() == {"teacher", name, f"{name} (D)"}


def test_a_remote_model_has_the_name_of_its_url(
    encoder: str, toy_data: str, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = storage.join(bucket, "runs/tiny/students/student/model")
    for path in Path(encoder).iterdir():
        storage.publish_bytes(storage.join(url, path.name), path.read_bytes())
    score(url, toy_data, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()).keys() == {"tiny"}
    capsys.readouterr()
    score(f"{url}/", toy_data, tmp_path)
    assert "rows/s" not in capsys.readouterr().err


def test_a_hub_model_has_the_name_of_the_hub(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(encoder, tmp_path / "snapshots/0123abcd")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path / "snapshots/0123abcd")
    )
    monkeypatch.chdir(tmp_path)
    score("someone/tiny-bert", toy_data, tmp_path / "out")
    assert json.loads((tmp_path / "out/scores.json").read_text()).keys() == {"tiny-bert"}


def test_the_home_directory_is_meant_by_a_tilde(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(encoder, tmp_path / "home/m")
    shutil.copytree(toy_data, tmp_path / "home/d")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    score("~/m", "~/d", Path("~/out"))
    assert (tmp_path / "home/out/scores/m/SST-2/seed-0.json").exists()
    assert not list((tmp_path / "cwd").iterdir())


def test_answers_that_stand_elsewhere_are_said_before_the_training(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "dev"):
        answer = {"text": "red car", "answer_start": 5 if part == "train" else 4}
        row = {"id": f"{part} 1", "question": "who ?", "answers": [answer]}
        content = {"data": [{"paragraphs": [{"context": "the red car is very fine", "qas": [row]}]}]}
        (tmp_path / f"{part}-v1.1.json").write_text(json.dumps(content))
    arguments = model_arguments(encoder, str(tmp_path), tmp_path / "out") | {"--tasks": "SQuAD"}
    assert main([f"{name}={value}" for name, value in arguments.items()]) == 0
    printed = capsys.readouterr().out
    note = "SQuAD train: answers that are not at their answer_start, moved to the nearest occurrence: 1"
    assert f"note: {note} (first: question train 1 of {tmp_path}/train-v1.1.json)" in printed
    assert printed.index("note:") < printed.index("exact_match")


def test_a_cluster_that_is_gone_is_one_line(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:  # bound, and refuses
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        command = ["--model", encoder, "--tasks", "SST-2", "--data", toy_data, "--output", str(tmp_path)]
        with pytest.raises(UserError, match=f"^RAY_ADDRESS: no Ray cluster answers at {address}"):
            main([*command, "--seeds", "2", *QUICK, "--workers", "2"])


def test_a_recipe_gives_three_rows_once(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", recipe_file]) == 0
    directory = Path(load_recipe(recipe_file).evaluation_dir)
    content = json.loads((directory / "report.json").read_text())
    assert content["rows"].keys() == {"teacher", "student", "undistilled"}
    student = content["rows"]["student"]
    assert student["retention"] == pytest.approx(student["macro"] / content["rows"]["teacher"]["macro"])
    weights = Path(load_recipe(recipe_file).run("student").directory) / "model/model.safetensors"
    assert student["bytes"] == weights.stat().st_size
    assert content["latency_setting"]["sentences"] == 64
    assert content["latency_setting"]["texts"] == "SST-2 dev"  # there is no STS-B here
    assert content["latency_rows"].keys() == {"student ONNX fp32", "student ONNX int8"}
    device = content["devices"]["student"]["SST-2"]
    assert device["score"] == student["scores"]["SST-2"]["score"]
    assert device["int8_lost"] == pytest.approx(device["score"] - device["int8_score"])
    assert (directory / "export/student/SST-2/model.int8.onnx").exists()
    names = {path.name for path in directory.iterdir()}
    assert names == {"recipe.yaml", "report.json", "report.md", "report.html", "retention.png",
                     "score_latency.png", "loss_curves.png", "scores", "export"}  # fmt: skip
    table = capsys.readouterr().out
    assert table.index("teacher") < table.index("student")

    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    told_without_torch(["--recipe", recipe_file])
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before
    capsys.readouterr()

    (directory / "report.json").unlink()
    assert main(["--recipe", recipe_file]) == 0
    again = json.loads((directory / "report.json").read_text())
    assert again["rows"]["student"]["scores"] == student["scores"]
    assert "rows/s" not in capsys.readouterr().err


def test_overrides_reach_the_run(recipe_file: str) -> None:
    changes = ["references=[]", "latency_sentences=7", "second_distillation=true"]
    changes = [f"evaluation.{change}" for change in changes]
    assert main(["--recipe", recipe_file, *changes]) == 0
    content = json.loads((Path(load_recipe(recipe_file).evaluation_dir) / "report.json").read_text())
    assert content["rows"].keys() == {"teacher", "student", "student (D)"}
    assert content["latency_setting"]["texts"] == "first 7 of SST-2 dev"


def test_a_family_is_evaluated_whole_from_its_store(
    encoder: str, pooler_free_encoder: str, headless_encoder: str, tmp_path: Path,
    make_task: Callable[[Path, int], str], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One student with a masked-LM head, one of relations alone; no corpus and no teacher in the recipe."""
    data = make_task(tmp_path / "data", 64)
    (Path(data) / "SST-2/test.tsv").write_text("index\tsentence\n0\tthe film is fine\n")
    recipe = family_recipe(tmp_path, save_store(tmp_path / "store", encoder), data=data)
    for name, model in (("half", pooler_free_encoder), ("tiny", headless_encoder)):
        shutil.copytree(model, os.path.join(recipe.run(name).directory, "model"))
    path = tmp_path / "family.yaml"
    path.write_text(recipe.to_yaml())
    command = ["--recipe", str(path), "--submission", "evaluation.second_distillation=true"]
    assert main(command) == 0
    directory = Path(recipe.evaluation_dir)
    content = json.loads((directory / "report.json").read_text())
    students = ["half", "tiny"]
    taught = [f"{name} (D)" for name in students]
    undistilled = [f"undistilled {name}" for name in students]
    assert content["rows"].keys() == {"teacher", *students, *taught, *undistilled}
    assert content["students"] == students
    for name in students:
        sizes = {content["rows"][row]["parameters"] for row in content["rows"] if row.endswith(name)}
        assert sizes == {content["rows"][f"{name} (D)"]["parameters"]}
        assert content["rows"][name]["references"] == {"random": f"undistilled {name}"}
        assert (directory / f"export/{name}/SST-2/model.int8.onnx").exists()
        assert content["devices"][name]["SST-2"]["score"] == content["rows"][name]["scores"]["SST-2"]["score"]
        assert (directory / f"submission-{name}.zip").exists()
    assert content["latency_rows"].keys() == {
        f"{name} ONNX {kind}" for name in students for kind in ("fp32", "int8")
    }
    assert content["rows"]["tiny"]["latency"] == content["rows"]["tiny (D)"]["latency"]
    assert content["rows"]["tiny"]["latency"] != content["rows"]["half"]["latency"]
    table = capsys.readouterr().out.partition("model ")[2].splitlines()[2:]  # below the header and its line
    rows = ["teacher", *students, *taught, *undistilled]
    assert [line.split("  ")[0] for line in table[: len(rows)]] == rows
    told_without_torch(command)


def test_a_student_that_is_not_trained_is_named_and_the_others_are_scored(
    encoder: str, headless_encoder: str, toy_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = save_store(tmp_path / "store", encoder)
    recipe = family_recipe(tmp_path, store, data=toy_data, references=())
    path = tmp_path / "family.yaml"
    path.write_text(recipe.to_yaml())
    shutil.copytree(headless_encoder, os.path.join(recipe.run("tiny").directory, "model"))
    assert main(["--recipe", str(path)]) == EXIT_INCOMPLETE
    assert "note: no row for half: it is not trained" in capsys.readouterr().out
    report = Path(recipe.evaluation_dir) / "report.json"
    scores = Path(recipe.evaluation_dir) / "scores/tiny/SST-2/seed-0.json"
    first = scores.read_bytes()
    assert json.loads(report.read_text())["rows"].keys() == {"teacher", "tiny"}
    shutil.copytree(encoder, os.path.join(recipe.run("half").directory, "model"))
    assert main(["--recipe", str(path)]) == 0
    assert json.loads(report.read_text())["rows"].keys() == {"teacher", "half", "tiny"}
    assert scores.read_bytes() == first
    more = dataclasses.replace(recipe, students={**recipe.students, "other": recipe.students["half"]})
    path.write_text(more.to_yaml())
    capsys.readouterr()
    assert main(["--recipe", str(path)]) == EXIT_INCOMPLETE
    assert "note: no row for other: it is not trained" in capsys.readouterr().out


def model_arguments(encoder: str, data: str, output: Path) -> dict[str, str]:
    return {
        "--model": encoder,
        "--tasks": "SST-2",
        "--data": data,
        "--output": str(output),
        "--epochs": "0.1",
        "--tracking": "off",
    }


# what is changed of a right command, what the one line must say
WRONG = [
    ({"--model": "./nowhere"}, "./nowhere: no such model directory"),
    ({"--tasks": "SST2"}, "did you mean SST-2?"),
    ({"--tasks": "SST-2,sst-2"}, "SST-2 is named twice"),
    ({"--tasks": "RTE"}, "has no RTE/train.tsv"),
    ({"--tasks": ""}, "needs --tasks"),
    ({"--tasks": ","}, "names no task"),
    ({"--data": "./nowhere"}, "has no SST-2/train.tsv"),
    ({"--seeds": "0"}, "--seeds: names no seed"),
    ({"--epochs": "-1"}, "--epochs: must be > 0"),
    ({"--batch-size": "-4"}, "--batch-size: must be >= 1"),
    ({"--learning-rate": "-1"}, "--learning-rate: must be > 0"),
    ({"--max-length": "4"}, "--max-length: must be 8 to 512"),
    ({"--workers": "-1"}, "--workers: must be >= 1"),
    ({"--temperature": "3"}, "--temperature: needs --teacher"),
    ({"--teacher": "./nowhere"}, "./nowhere: no such model directory"),
    ({"--teacher": "./nowhere", "--temperature": "0"}, "--temperature: must be > 0"),
    ({"--recipe": "r.yaml"}, "give either --recipe FILE or --model DIR"),
    ({"--output": "/dev/null/scores"}, "/dev/null"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[says for _, says in WRONG])
def test_wrong_command(
    encoder: str, toy_data: str, tmp_path: Path, change: dict[str, str], says: str
) -> None:
    arguments = model_arguments(encoder, toy_data, tmp_path / "out") | change
    with pytest.raises(UserError) as caught:
        main([f"{name}={value}" for name, value in arguments.items()])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("seed-*"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def other_weights(directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"stranger": torch.zeros(2)}, str(directory / "model.safetensors"), metadata={"format": "pt"})


# what is done to a right model directory, what the one line must say
BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda model: (model / "model.safetensors").unlink(), "no model.safetensors"),
    (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
        "pytorch_model.bin is not read",
    ),
    (cut_weights, "the model cannot be loaded"),
    (other_weights, "lacks"),
    (lambda model: (model / "config.json").unlink(), "no config.json"),
    (lambda model: (model / "config.json").write_text("{}"), "no 'model_type'"),
    (lambda model: (model / "config.json").write_text("{"), "is not JSON"),
    (lambda model: edit_config(model, model_type="unheard"), "config.json: cannot be used"),
    (lambda model: edit_config(model, vocab_size=12), "but the model only 12 embeddings"),
    (lambda model: edit_config(model, max_position_embeddings=16), "has only 16 positions"),
    (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda model: (model / "tokenizer.json").write_text("{}"), "the tokenizer cannot be loaded"),
]


@pytest.mark.parametrize(("damage", "says"), BROKEN, ids=[says for _, says in BROKEN])
def test_broken_model(
    encoder: str, toy_data: str, tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(encoder, model)
    damage(model)
    arguments = model_arguments(str(model), toy_data, tmp_path / "out")
    with pytest.raises(UserError) as caught:
        main([f"{name}={value}" for name, value in arguments.items()])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_without_its_student(recipe_file: str) -> None:
    shutil.rmtree(load_recipe(recipe_file).run("student").directory)
    with pytest.raises(UserError, match="is not trained yet; run student_train"):
        main(["--recipe", recipe_file])
    assert not Path(load_recipe(recipe_file).evaluation_dir).exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "3"], "evaluation.seeds="),
        (["evaluation.epoch=1"], "epochs"),
        (["--output", "x"], "needs --model"),
    ],
)
def test_wrong_recipe_command(recipe_file: str, arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        main(["--recipe", recipe_file, *arguments])
