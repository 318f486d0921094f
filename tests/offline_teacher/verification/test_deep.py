"""``verify --deep``: stored numbers against the replayed teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from infra.errors import UserError
from offline_teacher.main import main
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.store import Store, open_store
from offline_teacher.verification import deep
from tests.offline_teacher.local_pool import make
from tests.offline_teacher.tiny_teacher import save_bert


def test_deep_needs_to_know_the_teachers_format(store: Path) -> None:
    opened = open_store(str(store))
    for found in ({}, {"recipe": 3}, {"recipe": {"teacher": {"dtype": "float8"}}}):
        spec = replace(opened.spec, fingerprint={**opened.fingerprint, "recipe": None, **found})
        with pytest.raises(UserError, match=r"--deep needs recipe\.teacher\.dtype"):
            list(deep.deep_check(Store(str(store), spec, opened.manifest), 1))


def test_deep_says_how_much_it_compared(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def compared(*more: str) -> int:
        assert main(["verify", str(store), "--deep", *more]) == 0
        words = capsys.readouterr().out.replace(",", "").split()
        assert words[0] == "deep:"
        return int(words[1])

    tokens = sum(split.tokens for split in open_store(str(store)).splits.values())
    tasks = len(list((store / "tasks").rglob("*.json")))
    assert compared("--deep-positions", "3") == 3 * tasks
    assert compared("--deep-positions", "all") == tokens


@pytest.mark.parametrize("column", ["topk_logits", "topk_ids", "logsumexp"])
@pytest.mark.parametrize("replay_layers", [0, 1])
def test_deep_finds_numbers_that_are_possible_but_of_another_sample(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, replay_layers: int
) -> None:
    """Every digest is right; the numbers of a column belong to the next sample."""
    store = _store(made, tmp_path, replay_layers)
    assert list(deep.deep_check(store, 64)) == []
    original = BlockReader.task_rows

    def shifted(*arguments: object) -> dict[str, np.ndarray]:
        columns = original(*arguments)  # type: ignore[arg-type]
        return {**columns, column: np.roll(columns[column], 1, axis=0)}

    monkeypatch.setattr(BlockReader, "task_rows", shifted)
    found = list(deep.deep_check(store, 64))
    assert {finding.column for finding in found} >= {column}


def _store(made: Path, tmp_path: Path, replay_layers: int) -> Store:
    """The store of a teacher whose distributions differ from sample to sample."""
    values = yaml.safe_load(made.read_text())
    model = save_bert(tmp_path / "sharp", seed=2, scale=1.0)
    values["teacher"]["model"] = str(model)
    values["output"] = str(tmp_path / "runs")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return make(path, f"store.replay_layers={replay_layers}", "store.hidden_states=float16")
