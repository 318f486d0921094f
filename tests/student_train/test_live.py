"""A live teacher gives the losses of its store, and a store of token states those of a pooled store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offline_teacher.families import family_of
from offline_teacher.models.split import lower_part, lower_part_from_weights
from offline_teacher.models.weights import named_weights
from student_train.engine.world import World
from tests.offline_teacher.families.tiny_models import FAMILIES, batch, masked_lm
from tests.student_train.tiny_run import command, logged, make_run, student, validated

RELATIONS = ["train.alpha_ce=0", "train.alpha_mlm=0", "train.alpha_cos=0", "train.alpha_relation=1"]
VECTORS = [*RELATIONS[:3], "train.alpha_embedding=1"]
POOLED: dict[str, Any] = {"positions": "pooled", "top_k": 0, "hidden_states": "none", "masked": 0}
TEXTS: dict[str, Any] = {"documents": True, "top_k": 0, "masked": 0}
TERMS = ("loss", "kl", "mlm", "cosine", "relation", "embedding")
SHORT = ["train.epochs=1", "student.dropout=0"]


def both(root: Path, *words: str) -> None:
    """Trains from the store and with the live teacher: equal losses, up to the rounding to float16."""
    command(root, *SHORT, *words)
    stored, told = logged(root), validated(root)
    student(root).rename(student(root, "stored"))
    command(root, *SHORT, *words, "train.teacher=live")
    for ours, theirs in zip(logged(root), stored, strict=True):
        assert ours["samples"] == theirs["samples"]
        for name in TERMS:
            assert ours[name] == pytest.approx(theirs[name], rel=3e-3, abs=1e-6), name
    assert validated(root) == pytest.approx(told, rel=3e-3)


@pytest.mark.parametrize("words", [[], RELATIONS, ["train.alpha_relation=1"]], ids=["triple", "rel", "all"])
def test_a_live_teacher_says_what_the_store_says(alone: World, replay_dir: Path, words: list[str]) -> None:
    both(replay_dir, *words)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_live_teacher_in_bfloat16_is_set_up_as_its_family_asks(family: str) -> None:
    """It is set up as the teacher of a pass. ModernBERT's rotary frequencies, for example, must stay
    float32."""
    model, (ids, count) = masked_lm(family), batch()
    live = lower_part_from_weights(model.config, named_weights(model), 1).to(torch.bfloat16)
    family_of(model.config).prepare(model)
    recorded = lower_part(model, 1).to(torch.bfloat16)
    torch.testing.assert_close(live(ids, count), recorded(ids, count), rtol=0, atol=0)


def test_vectors_of_a_live_teacher(alone: World, tmp_path: Path) -> None:
    make_run(tmp_path, **POOLED)
    both(tmp_path, *VECTORS)
    assert (student(tmp_path) / "model" / "modules.json").exists()


def test_a_live_teacher_needs_nothing_of_it_in_the_store(alone: World, tmp_path: Path) -> None:
    """With a store of top-k logits at masked positions, the loss covers all positions and relations."""
    make_run(tmp_path, positions="masked", hidden_states="none")
    assert command(tmp_path, *SHORT, "train.teacher=live", "train.alpha_relation=1") == 0
    lines = logged(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert min(lines[0][name] for name in TERMS[:5]) > 0
    assert {"kl_t1", "cosine", "relation"} <= set(validated(tmp_path))


@pytest.mark.parametrize("replay_layers", [0, 1])
def test_vectors_of_a_store_of_texts_are_those_of_a_pooled_one(
    alone: World, tmp_path: Path, replay_layers: int
) -> None:
    still = [*SHORT, *VECTORS, "train.learning_rate=1e-12"]
    make_run(tmp_path / "pooled", **POOLED)
    make_run(tmp_path / "texts", **TEXTS, replay_layers=replay_layers)
    for name in ("pooled", "texts"):
        command(tmp_path / name, *still)
    assert validated(tmp_path / "texts") == pytest.approx(validated(tmp_path / "pooled"), rel=1e-3)
    assert logged(tmp_path / "texts")[0]["loss"] == logged(tmp_path / "texts")[0]["embedding"] > 0
    assert (student(tmp_path / "texts") / "model" / "1_Pooling").is_dir()


def test_vectors_and_relations_of_one_store(alone: World, tmp_path: Path) -> None:
    make_run(tmp_path, **TEXTS, replay_layers=1)
    command(tmp_path, *SHORT, *RELATIONS[:3], "train.alpha_embedding=2", "train.alpha_relation=3")
    lines = logged(tmp_path)
    for line in lines:
        assert line["loss"] == pytest.approx(2 * line["embedding"] + 3 * line["relation"], rel=1e-5)
    assert all(lines[-1][name] < lines[0][name] for name in ("embedding", "relation"))
    assert set(validated(tmp_path)) == {"embedding", "relation"}
