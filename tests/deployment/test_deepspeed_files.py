"""The DeepSpeed files beside the recipes: accepted by the trainer's merge, arithmetic as their table says."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from infra.errors import UserError
from infra.settings.sections import Train
from student_train.engine.deepspeed_config import build_config
from tests.conftest import ROOT

FOLDER = ROOT / "infra" / "deploy" / "deepspeed"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_recipe_is_merged_over_the_file(stage: int) -> None:
    path = FOLDER / f"zero{stage}.json"
    train = Train(zero_stage=stage, deepspeed_config=str(path), batch_size=4096, micro_batch_size=64)  # type: ignore[arg-type]
    config = build_config(train, 8)
    assert config["train_batch_size"] == 4096
    assert config["gradient_accumulation_steps"] == 8
    assert config["zero_optimization"] == json.loads(path.read_text())["zero_optimization"]
    assert "auto" not in json.dumps(config)
    other = dataclasses.replace(train, zero_stage=(stage + 1) % 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"zero_optimization\.stage"):
        build_config(other, 8)


def test_batch_arithmetic_of_the_table() -> None:
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", (FOLDER / "README.md").read_text(), re.M
    )
    assert len(rows) == 6
    for batch, micro, ranks, accumulation, share in (map(int, row) for row in rows):
        config = build_config(Train(batch_size=batch, micro_batch_size=micro), ranks)
        assert config["gradient_accumulation_steps"] == accumulation
        assert share == micro * accumulation
        assert share * ranks == batch


def test_hostfile_is_what_deepspeed_reads() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert set(fetch_hostfile(str(FOLDER / "hostfile")).values()) == {8}


def test_memory_table() -> None:
    """Bytes of Rajbhandari et al. for 66 M parameters and 8 ranks."""
    n, ranks = 66e6, 8
    expected = [16 * n, 4 * n + 12 * n / ranks, 2 * n + 14 * n / ranks]
    given = re.findall(r"`zero\d\.json` .* \| ([\d.]+) GB \|", (FOLDER / "README.md").read_text())
    assert [f"{value / 1e9:.2f}" for value in expected] == given
