"""Which rows a recipe's report has, and where the teacher comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.candidates.models import load_model, load_tokenizer, local_directory
from evaluation.candidates.recipe_rows import Rows, rows_of
from evaluation.sources.catalogue import find_task
from infra.errors import UserError
from infra.files import storage
from infra.settings.recipe import Recipe
from infra.settings.sections import Teacher
from tests.evaluation.families import family_recipe, save_store


@contextlib.contextmanager
def rows(recipe: Recipe) -> Iterator[Rows]:
    with contextlib.ExitStack() as stack:
        yield rows_of(recipe, stack)


def names(found: Rows) -> list[str]:
    return [one.name for one in found.candidates]


def train(recipe: Recipe, **models: str) -> None:
    for name, model in models.items():
        shutil.copytree(model, storage.join(recipe.run(name).directory, "model"))


def test_students_of_one_shape_share_their_undistilled_form(
    encoder: str, headless_encoder: str, tmp_path: Path
) -> None:
    """With a vocabulary in the loss or without: it is the encoder that is fine-tuned."""
    from transformers import BertModel

    recipe = family_recipe(tmp_path, save_store(tmp_path / "store", encoder))
    alone = tmp_path / "alone"
    shutil.copytree(encoder, alone)
    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(alone)
    assert json.loads((alone / "config.json").read_text())["architectures"] == ["BertModel"]
    train(recipe, half=encoder, tiny=str(alone))
    with rows(recipe) as found:
        assert names(found) == ["teacher", "half", "tiny", "undistilled half"]
        assert found.references == dict.fromkeys(("half", "tiny"), {"random": "undistilled half"})
    shutil.rmtree(storage.join(recipe.run("tiny").directory, "model"))
    train(recipe, tiny=headless_encoder)
    with rows(recipe) as found:
        assert names(found) == ["teacher", "half", "tiny", "undistilled half", "undistilled tiny"]
        assert [one.student for one in found.candidates] == [None, "half", "tiny", "half", "tiny"]


@pytest.mark.parametrize("place", ["local", "remote"])
def test_the_stores_teacher_is_a_model_directory(
    place: str, encoder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import torch

    root = request.getfixturevalue("bucket") if place == "remote" else str(tmp_path)
    recipe = family_recipe(tmp_path, save_store(storage.join(root, "store"), encoder))
    train(recipe, half=encoder)
    with rows(recipe) as found:
        teacher = found.candidates[0]
        models = [
            load_model(dataclasses.replace(teacher, directory=directory), find_task("SST-2"), seed=0)
            for directory in (teacher.directory, encoder)
        ]
        vocabularies = [load_tokenizer(directory).get_vocab() for directory in (teacher.directory, encoder)]
    assert vocabularies[0] == vocabularies[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_remote_sentence_encoder_is_copied_without_its_folders(bucket: str) -> None:
    for name in ("config.json", "modules.json", "1_Pooling/config.json"):
        storage.publish_bytes(storage.join(bucket, "model", name), b"{}")
    with local_directory(storage.join(bucket, "model")) as copy:
        assert sorted(path.name for path in Path(copy).iterdir()) == ["config.json", "modules.json"]


def test_a_teacher_whose_weights_are_withheld_has_no_row(encoder: str, tmp_path: Path) -> None:
    store = save_store(tmp_path / "store", encoder, teacher_weights=False)
    recipe = family_recipe(tmp_path, store)
    train(recipe, half=encoder)
    with rows(recipe) as found:
        assert names(found) == ["half", "undistilled half"]
        assert f"no row for the teacher: the store {store} holds no weights of its teacher" in found.notes[0]
    asked = dataclasses.replace(recipe.evaluation, second_distillation=True)
    with pytest.raises(UserError, match="evaluation.second_distillation: the store .* no weights"):  # noqa: SIM117
        with rows(dataclasses.replace(recipe, evaluation=asked)):
            pass
    named = dataclasses.replace(recipe, teacher=Teacher(model=encoder))
    with rows(named) as found:
        assert names(found) == ["teacher", "half", "undistilled half"]
        assert found.candidates[0].directory == encoder


def test_without_a_store_the_teacher_must_be_named(encoder: str, tmp_path: Path) -> None:
    recipe = family_recipe(tmp_path, str(tmp_path / "nowhere"))
    train(recipe, half=encoder)
    with pytest.raises(UserError, match="nowhere is not a store"), rows(recipe):
        pass
    with rows(dataclasses.replace(recipe, teacher=Teacher(model=encoder))) as found:
        assert found.candidates[0].directory == encoder
