"""A teacher, its tokenizer, and a plan that several modules look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offline_teacher.main import main
from offline_teacher.sequences.tokenizer import Encoder, load_encoder
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("plan") / "model", num_hidden_layers=4)


@pytest.fixture(scope="session")
def encoder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """Of the tokenizer's files alone, as a store has them."""
    directory = tmp_path_factory.mktemp("tokenizer")
    for path in model.glob("*token*"):
        (directory / path.name).write_bytes(path.read_bytes())
    return load_encoder(str(directory))


@pytest.fixture(scope="session")
def planned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """The directory of a plan, its report, and the recipe it was made of."""
    directory = tmp_path_factory.mktemp("planned")
    text = write_text(directory / "text.txt", 400)
    recipe = write_recipe(directory, text, model, masking={"epochs": 3})
    assert main(["plan", "--recipe", str(recipe)]) == 0
    found = directory / "runs/tiny/plan"
    return found, json.loads((found / "plan.json").read_text()), str(recipe)
