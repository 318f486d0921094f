"""References of students: what they were before their training, and a student of masked LM alone."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from evaluation.candidates import starts
from evaluation.candidates.models import load_model
from evaluation.candidates.recipe_rows import MASKED_LM, rows_of
from evaluation.sources.catalogue import find_task
from infra.errors import UserError
from infra.files import storage
from infra.settings.recipe import Recipe
from infra.settings.sections import Student, Train, Variant
from tests.evaluation.families import family_recipe, save_store
from tests.evaluation.test_recipe_rows import train


@pytest.fixture
def recipe(encoder: str, headless_encoder: str, tmp_path: Path) -> Recipe:
    """Students ``half`` and ``tiny`` of a BERT of two layers of 32; ``tiny`` takes layer 0 at width 16."""
    store = save_store(tmp_path / "store", encoder)
    found = family_recipe(tmp_path, store, references=("random", "start"))
    tiny = dataclasses.replace(
        found.students["tiny"], student=Student(layers=(0,), hidden_size=16, attention_heads=2)
    )
    found = dataclasses.replace(found, students=found.students | {"tiny": tiny})
    train(found, half=encoder, tiny=headless_encoder)
    return found


def test_a_start_is_the_teachers_layers(recipe: Recipe, encoder: str) -> None:
    with contextlib.ExitStack() as stack:
        rows = rows_of(recipe, stack)
        names = [one.name for one in rows.candidates]
        assert names == [
            "teacher",
            "half",
            "tiny",
            "undistilled half",
            "undistilled tiny",
            "start half",
            "start tiny",
        ]
        assert rows.references["half"] == {"random": "undistilled half", "start": "start half"}
        assert rows.references["tiny"]["start"] == "start tiny"
        directories = {one.name: one.directory for one in rows.candidates}
        teacher = load_file(Path(encoder) / "model.safetensors")
        half = load_file(Path(directories["start half"]) / "model.safetensors")
        queries = teacher["bert.encoder.layer.0.attention.self.query.weight"]  # every second of two layers
        assert (half["transformer.layer.0.attention.q_lin.weight"] == queries).all()
        assert not any(".layer.1." in name for name in half)
        tiny = load_file(Path(directories["start tiny"]) / "model.safetensors")
        words = tiny["embeddings.word_embeddings.weight"]
        columns = {tuple(column) for column in teacher["bert.embeddings.word_embeddings.weight"].T.tolist()}
        assert words.shape[1] == 16
        assert all(tuple(column) in columns for column in words.T.tolist())
        for one in rows.candidates:
            if one.name.startswith("start"):
                assert one.student is not None
                assert one.student in one.name
                load_model(one, find_task("SST-2"), seed=0)


def test_a_start_is_made_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        rows_of(recipe, stack)
    monkeypatch.setattr(starts, "_build", lambda *arguments: pytest.fail("made again"))
    with contextlib.ExitStack() as stack:
        assert "start half" in [one.name for one in rows_of(recipe, stack).candidates]
    other = dataclasses.replace(recipe.students["half"], student=Student(layers=(1,)))
    made: list[Any] = []
    monkeypatch.setattr(starts, "_build", lambda *arguments: made.append(arguments))
    with contextlib.ExitStack() as stack:
        rows_of(dataclasses.replace(recipe, students=recipe.students | {"half": other}), stack)
    assert len(made) == 1  # of the student that starts from other layers now


def test_students_that_start_alike_share_the_row(recipe: Recipe, encoder: str) -> None:
    twin = dataclasses.replace(recipe, students=recipe.students | {"twin": recipe.students["half"]})
    train(twin, twin=encoder)
    with contextlib.ExitStack() as stack:
        assert rows_of(twin, stack).references["twin"]["start"] == "start half"


def test_a_student_of_random_weights_has_no_start(recipe: Recipe) -> None:
    random = Variant(student=Student(init="random"), train=Train())
    changed = dataclasses.replace(recipe, students=recipe.students | {"half": random})
    with contextlib.ExitStack() as stack:
        rows = rows_of(changed, stack)
        assert "start" not in rows.references["half"]
        assert any("no row start for half" in note for note in rows.notes)


def test_a_store_without_the_teachers_weights_has_no_starts(encoder: str, tmp_path: Path) -> None:
    store = save_store(tmp_path / "store", encoder, teacher_weights=False)
    recipe = family_recipe(tmp_path, store, references=("start",))
    train(recipe, half=encoder)
    with contextlib.ExitStack() as stack:
        rows = rows_of(recipe, stack)
        assert [one.name for one in rows.candidates] == ["half"]
        assert any("no row start: the store" in note for note in rows.notes)


def test_masked_lm_alone_is_a_reference_for_the_same_shape_and_steps(recipe: Recipe, encoder: str) -> None:
    alone = Train(alpha_ce=0.0, alpha_cos=0.0)
    changed = recipe.students | {
        "mlm": Variant(student=Student(), train=alone),
        "longer": Variant(student=Student(), train=Train(epochs=9)),
    }
    family = dataclasses.replace(recipe, students=changed)
    train(family, mlm=encoder, longer=encoder)
    with contextlib.ExitStack() as stack:
        references = rows_of(family, stack).references
        assert references["half"][MASKED_LM] == "mlm"
        assert all(MASKED_LM not in references[name] for name in ("mlm", "tiny", "longer"))


def test_other_models_are_rows_of_their_own_names(
    recipe: Recipe, pooler_free_encoder: str, tmp_path: Path
) -> None:
    settings = dataclasses.replace(recipe.evaluation, models={"stock": pooler_free_encoder})
    with contextlib.ExitStack() as stack:
        last = rows_of(dataclasses.replace(recipe, evaluation=settings), stack).candidates[-1]
        assert (last.name, last.directory, last.student) == ("stock", pooler_free_encoder, None)
    missing = dataclasses.replace(settings, models={"stock": str(tmp_path / "nowhere")})
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match="no such model directory"):
        from evaluation.finetuning.scores import prepare

        rows = rows_of(dataclasses.replace(recipe, evaluation=missing), stack)
        prepare(rows.candidates, missing, storage.join(str(tmp_path), "scores"))
