"""A real local Ray: workers, their deaths, the driver's death and failing tasks do not change a byte."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.console import EXIT_TERMINATED
from infra.errors import EXIT_INCOMPLETE, EXIT_USER_ERROR
from infra.files import scratch
from tests.offline_teacher.stores import contents, finish, indices, start, wait_until, workers
from tests.offline_teacher.tiny_teacher import WORDS, save_bert, write_recipe, write_text

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pass")
    text, model = write_text(directory / "text.txt", 500), save_bert(directory / "model")
    held_out = write_text(directory / "held_out.txt", 40, seed=1)
    corpus = {"path": [str(text)], "validation_path": [str(held_out)]}
    return write_recipe(directory, text, model, corpus=corpus, masking={"epochs": 2})


@pytest.fixture(scope="module")
def reference(recipe: Path) -> dict[str, bytes]:
    """The store of one undisturbed worker."""
    code, output = finish(start(recipe))
    assert code == 0, output
    assert "the store is" in output
    return contents(recipe.parent / "runs/tiny/store")


@pytest.mark.slow
def test_another_run_with_another_number_of_workers(
    recipe: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    """One of the workers is killed over its task; the store lies elsewhere."""
    store = tmp_path / "elsewhere"
    process = start(recipe, f"output={tmp_path}", f"store.path={store}", "teacher.workers=3")
    wait_until(lambda: len(indices(store)) > 0 and len(workers(process.pid)) > 0, process)
    workers(process.pid)[0].kill()
    assert not (store / "manifest.json").exists()
    code, output = finish(process)
    assert code == 0, output
    assert contents(store) == reference


def test_sigterm_ends_it_with_its_own_code_and_the_workers_clean_up(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the driver waits for Ray, which has no home, and a TMPDIR too long for its sockets."""
    temporary = tmp_path / ("t" * 100)
    temporary.mkdir()
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start(recipe, f"output={tmp_path}")
    wait_until(lambda: len(indices(tmp_path / "tiny/store")) > 0, process)
    assert list(temporary.glob(f"{scratch.PREFIX}*"))
    process.terminate()
    code, output = finish(process)
    assert code == EXIT_TERMINATED, output
    assert "interrupted; the same command continues" in output
    assert list(temporary.glob(f"{scratch.PREFIX}*")) == []


@pytest.mark.slow
def test_a_driver_killed_again_and_again_resumes(
    recipe: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    """While it tokenises, at its first task, and later; what was finished is not made again."""
    store = tmp_path / "tiny/store"
    kept: dict[Path, int] = {}
    for steps in (lambda: len(list(store.glob("sequences/train/part-*.json"))), lambda: len(indices(store))):
        before = steps()
        process = start(recipe, f"output={tmp_path}")
        wait_until(lambda: steps() > before, process)  # noqa: B023
        process.kill()
        process.wait()
        assert not (store / "manifest.json").exists()
        kept |= {path: path.stat().st_mtime_ns for path in indices(store)}
    code, output = finish(start(recipe, f"output={tmp_path}"))
    assert code == 0, output
    assert contents(store) == reference
    assert kept
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_tasks_with_nan_are_quarantined_while_the_rest_finishes(tmp_path: Path) -> None:
    """One word's embedding is NaN, and it stands in one line of the text."""
    model = save_bert(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][5 + WORDS.index("bab")] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    text = write_text(tmp_path / "text.txt", 80)
    lines = [line.replace("bab", "bad") for line in text.read_text().splitlines()]
    text.write_text("\n".join([*lines[:40], "bab " * 20, *lines[40:]]))
    recipe = write_recipe(tmp_path, text, model, store={"top_k": 0}, masking={"probability": 0.01})
    code, output = finish(start(recipe))
    assert code == EXIT_INCOMPLETE, output
    store = tmp_path / "runs/tiny/store"
    failed = sorted((store / "failed/train").glob("*.json"))
    assert failed
    assert indices(store)
    assert not (store / "manifest.json").exists()
    for path in failed:
        record = json.loads(path.read_text())
        assert record["attempts"] == 3
        assert "hidden_states" in record["reason"]
        piece = int(path.stem.rpartition("-")[2])
        assert (record["part"], record["rows"]) == (0, [16 * piece, 16 * piece + 16])
        assert f"quarantined: task train/{path.stem}" in output
        assert not (store / f"tasks/train/{path.name}").exists()


@pytest.fixture
def port() -> Iterator[int]:
    """One at which nothing listens: it is bound, and refuses."""
    with socket.socket() as closed:
        closed.bind(("", 0))
        yield closed.getsockname()[1]


def test_a_cluster_that_is_not_there_is_one_line(recipe: Path, port: int, tmp_path: Path) -> None:
    address = f"127.0.0.1:{port}"
    code, output = finish(start(recipe, f"output={tmp_path}", f"teacher.ray_address={address}"))
    assert code == EXIT_USER_ERROR
    assert f"error: teacher.ray_address: no Ray cluster answers at {address}; start it" in output
    assert "Traceback" not in output
