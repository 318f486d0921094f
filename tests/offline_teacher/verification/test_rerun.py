"""``verify --rerun``: bytes in the same environment, a tolerance in another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infra.errors import UserError
from infra.files import storage
from offline_teacher.cluster.task_work import TaskWorker
from offline_teacher.main import main
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import Manifest
from offline_teacher.verification import rerun, verify_command
from offline_teacher.verification.verify_command import VerifyOptions
from tests.offline_teacher.verification.damage import (
    everything,
)


def whole(store: Path) -> list[str]:
    """What ``verify --rerun`` of all tasks finds."""
    asked = VerifyOptions(str(store), rerun=100)
    return [str(finding) for finding in verify_command.compare_with_teacher(asked)]


def test_a_rerun_in_the_same_environment_compares_bytes(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whole(store) == []
    told = capsys.readouterr().out
    assert "tasks compared byte for byte" in told
    assert "another environment" not in told
    _other_last_bits(monkeypatch, 1)
    found = whole(store)
    assert found
    assert all("gives other numbers in the same environment" in line for line in found)


@pytest.mark.parametrize(("steps", "within"), [(1, True), (4096, False)])
def test_a_rerun_in_another_environment_compares_within_a_tolerance(
    made: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    steps: int,
    within: bool,
) -> None:
    """The store is one that a GPU made; its numbers differ in their last bits, or by more."""
    _made_by(store, "NVIDIA H100")
    _other_last_bits(monkeypatch, steps)
    before = everything(store)
    code = main(["verify", str(store), "--rerun", "100", "--repair", "--recipe", str(made)])
    assert code == (0 if within else 3)
    told = capsys.readouterr().out
    assert "compared within the tolerance of another environment (device: 'NVIDIA H100' -> 'cpu')" in told
    assert ("off by" in told) != within
    assert everything(store) == before  # such a difference is never repaired
    assert not store.with_name("store.damaged").exists()


def test_text_and_masks_are_exact_in_every_environment(
    made: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _made_by(store, "NVIDIA H100")
    original = BlockReader.task_rows

    def one_label_changed(*arguments: object) -> dict[str, np.ndarray]:
        columns = original(*arguments)  # type: ignore[arg-type]
        return {**columns, "masked_labels": columns["masked_labels"] + (columns["masked_labels"] > 0)}

    monkeypatch.setattr(BlockReader, "task_rows", one_label_changed)
    assert any("column masked_labels" in line for line in whole(store))


def _made_by(store: Path, device: str) -> None:
    """Changes what the indices say of the environment, and the manifest with them."""
    manifest = Manifest.from_bytes((store / "manifest.json").read_bytes())
    splits = {}
    for split, record in manifest.splits.items():
        tasks = []
        for path in sorted((store / f"tasks/{split}").glob("*.json")):
            index = TaskIndex.from_bytes(path.read_bytes())
            data = replace(index, environment={**index.environment, "device": device}).to_bytes()
            path.write_bytes(data)
            tasks.append(storage.digest_bytes(data))
        splits[split] = replace(record, tasks=tuple(tasks))
    (store / "manifest.json").write_bytes(Manifest(manifest.spec, manifest.files, splits).to_bytes())


def _other_last_bits(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The teacher's hidden states come out some float16 steps larger."""
    original = TaskWorker.columns

    def columns(self: TaskWorker, *arguments: object) -> Iterator[dict[str, np.ndarray]]:
        for piece in original(self, *arguments):  # type: ignore[arg-type]
            bits = piece["hidden_states"].view(np.int16)
            changed = np.where(bits != 0, bits + np.int16(steps), bits).view(np.float16)
            yield {**piece, "hidden_states": changed}

    monkeypatch.setattr(TaskWorker, "columns", columns)


@pytest.mark.parametrize("changed", ["masking.seed=4", "store.top_k=4", "sequences.length=12"])
def test_a_rerun_of_another_recipe_is_refused(made: Path, store: Path, changed: str) -> None:
    with pytest.raises(
        UserError, match=f"was made differently .*{changed.partition('=')[0]}|made differently"
    ):
        main(["verify", str(store), "--rerun", "1", "--recipe", str(made), changed])


def test_bytes_are_compared_not_numbers() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert [row for _, row, _ in rerun.compare_bytes({"x": zeros}, {"x": -zeros})] == [0]
    assert list(rerun.compare_bytes({"x": zeros}, {"x": zeros.copy()})) == []
