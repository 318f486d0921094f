"""What the page does in a browser, where Node and Chromium are."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.web.site import RUNTIMES, SITE


@pytest.mark.parametrize("task", ["SQuAD", "SQuAD&model=teacher", "SST-2", "STS-B", "Similar"])
def test_the_page_computes_what_python_does(task: str, folder: Path, visit: Any) -> None:
    found = visit(folder, "selftest", f"task={task}")
    assert found["report"]["examples"] >= 3
    assert found["report"]["differences"] == []
    assert found["processor"] == "cpu"
    assert [name for name in found["asked"] if "gpu" in name] == []


@pytest.mark.parametrize(
    "task", ["SQuAD", *(pytest.param(name, marks=pytest.mark.slow) for name in ("STS-B", "Similar"))]
)
def test_a_graphics_processor_computes_what_python_does(task: str, folder: Path, visit: Any) -> None:
    found = _with_graphics(visit, folder, "selftest", task)
    assert found["processor"] == "gpu"
    assert found["report"]["differences"] == []
    assert "Computed by: the graphics processor (WebGPU)" in found["figures"]
    assert [name for name in found["asked"] if name.startswith(RUNTIMES["cpu"])] == []


def test_without_a_graphics_processor_the_processor_computes(folder: Path, visit: Any) -> None:
    found = visit(folder, "first", "task=SQuAD&processor=cpu")
    assert "Computed by: the processor (WebAssembly)" in found["figures"]


def test_a_graphics_processor_that_answers_otherwise_is_not_used(
    folder: Path, visit: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    with changed_golden(copy) as examples:
        examples[0]["span"]["score"] += 0.01
    found = _with_graphics(visit, copy, "first", "SQuAD")
    assert found["processor"] == "cpu"
    assert found["answer"]
    assert "Done in" in found["status"]
    assert any("failed: its answer to an example differs" in line for line in found["figures"])


def test_a_graphics_processor_whose_runtime_fails_is_not_used(
    folder: Path, visit: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    _cut(copy / RUNTIMES["gpu"])
    found = _with_graphics(visit, copy, "first", "SQuAD")
    assert found["processor"] == "cpu"
    assert found["answer"]
    assert "Done in" in found["status"]
    assert any("failed: runtime-gpu.wasm.gz is damaged" in line for line in found["figures"])


def _with_graphics(visit: Any, directory: Path, step: str, task: str) -> dict[str, Any]:
    """A visit with Chromium's emulated graphics processor; skips the test if this Chromium has none."""
    found: dict[str, Any] = visit(directory, step, f"task={task}&processor=gpu")
    if not found["adapter"]:
        pytest.skip("this Chromium emulates no graphics processor")
    return found


@contextlib.contextmanager
def changed_golden(site: Path) -> Iterator[list[dict[str, Any]]]:
    """The expected examples of the first model, to be changed in place; the folder stays consistent."""
    content = json.loads((site / SITE).read_text())
    about = content["tasks"][0]["models"][0]["golden"]
    golden = json.loads(gzip.decompress((site / about["path"]).read_bytes()))
    yield golden["examples"]
    data = gzip.compress(json.dumps(golden).encode())
    (site / about["path"]).write_bytes(data)
    about |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (site / SITE).write_text(json.dumps(content))


def test_the_self_test_finds_what_is_different(folder: Path, visit: Any, tmp_path: Path) -> None:
    """Each kind of expected value is changed in one example."""
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    with changed_golden(copy) as (first, second, third, fourth, fifth, *_):
        first["ids"][0][1] += 1
        second["span"]["first"] += 1
        third["span"]["text"] += "."
        fourth["span"]["score"] += 0.01
        fifth["span"]["noAnswer"] -= 0.01
    found = visit(copy, "selftest")["report"]["differences"]
    expected = [[0, "ids"], [1, "span"], [2, "answer"], [3, "score"], [4, "no answer"]]
    assert [[one["example"], one["what"]] for one in found] == expected


def test_the_page_works_without_a_network_after_the_first_visit(folder: Path, visit: Any) -> None:
    found = visit(folder, "offline")
    assert found["refused"]
    assert found["offline"] == found["online"]


@pytest.mark.parametrize("task", ["SQuAD", "SST-2", "Similar"])
def test_everybody_can_use_the_page(task: str, folder: Path, visit: Any) -> None:
    assert visit(folder, "accessibility", f"task={task}")["violations"] == []


@pytest.mark.parametrize("task", ["SQuAD", "STS-B"])
def test_hostile_texts_get_an_answer_or_a_message(task: str, folder: Path, visit: Any) -> None:
    found = visit(folder, "hostile", f"task={task}")["found"]
    assert {one["state"] for one in found.values()} == {"ready"}
    assert "first" in found["empty"]["answer"]


def test_a_megabyte_of_text_can_be_stopped(folder: Path, visit: Any) -> None:
    found = visit(folder, "large")
    assert found["characters"] == 1_000_000
    assert "Reading part" in found["during"]
    assert found["stopped"] == "Stopped."


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda site: (site / SITE).unlink(), "site.json is missing"),
        (lambda site: (site / SITE).write_text("{"), "site.json is damaged"),
        (lambda site: (site / "models/SQuAD/student/model.int8.onnx").unlink(), "model.int8.onnx is missing"),
        (lambda site: _flip(site / "models/SQuAD/student/model.int8.onnx"), "model.int8.onnx is damaged"),
        (lambda site: _cut(site / "models/SQuAD/student/model.int8.onnx"), "model.int8.onnx is damaged"),
        (lambda site: _flip(site / "models/SQuAD/student/tokenizer.json.gz"), "tokenizer.json.gz is damaged"),
        (lambda site: _cut(site / "runtime.wasm.gz"), "runtime.wasm.gz is damaged"),
    ],
)
def test_a_damaged_folder_is_named(damage: Any, says: str, folder: Path, visit: Any, tmp_path: Path) -> None:
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    damage(copy)
    found = visit(copy, "message")
    assert found["state"] == "error"
    assert says in found["status"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_the_folder_says_what_it_holds(folder: Path) -> None:
    site = json.loads((folder / SITE).read_text())
    assert [task["name"] for task in site["tasks"]] == ["SQuAD", "SST-2", "STS-B", "Similar"]
    assert [model["role"] for model in site["tasks"][0]["models"]] == ["student", "teacher"]
    assert site["tasks"][1]["models"][0]["labels"] == ["bad", "good"]
    stored = [
        model[key]
        for task in site["tasks"]
        for model in task["models"]
        for key in ("graph", "tokenizer", "golden")
    ]
    for file in [*site["runtimes"].values(), *stored]:
        data = (folder / file["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    policy = (folder / "index.html").read_text()
    assert "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'" in policy


@pytest.mark.parametrize("script", ["test", "check"])
def test_the_page_passes_its_own_tests_and_types(script: str, browser: Path) -> None:
    done = subprocess.run(["npm", "run", script], cwd=browser, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
