"""Mistakes about finished stores and their students: one line and exit code 2 before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_stores.spoiling import (
    RELATIONS,
    Case,
    another_manifest,
    check,
    flip,
    format_1,
    in_recipe,
    nothing,
    of_store,
    remove,
    students,
    unfinished,
)

FINISHED: dict[str, Case] = {
    # a damaged or unfinished store
    "a damaged index": (
        flip("stores/plain/tasks/train/*.json"),
        ["inspect", "{root}/stores/plain"],
        ["{root}/stores/plain is damaged: tasks/train/", "verify {root}/stores/plain --repair"],
    ),
    "a damaged shard": (
        flip("stores/plain/shards/train/*/*.arrow"),
        ["inspect", "{root}/stores/plain"],
        ["shards/train/", "block", "verify {root}/stores/plain --repair"],
    ),
    "a damaged spec": (
        flip("stores/plain/spec.json"),
        ["inspect", "{root}/stores/plain"],
        ["spec.json", "verify {root}/stores/plain --repair"],
    ),
    "no spec": (remove("stores/plain/spec.json"), of_store("plain"), ["spec.json is missing", "--repair"]),
    "another store's manifest": (another_manifest, of_store("plain"), ["spec.json has another digest"]),
    "damaged weights": (
        flip("stores/plain/teacher/model.safetensors"),
        ["inspect", "{root}/stores/plain"],
        ["teacher/model.safetensors has another digest", "--repair"],
    ),
    "a damaged tokenizer": (
        flip("stores/plain/tokenizer/tokenizer.json"),
        ["inspect", "{root}/stores/plain"],
        ["tokenizer/tokenizer.json", "--repair"],
    ),
    "inspect of format 1": (format_1, ["inspect", "{root}/old"], ["format 1", "make it again"]),
    "verify of format 1": (format_1, ["verify", "{root}/old"], ["format 1", "make it again"]),
    "training from format 1": (
        format_1,
        ["train", "--recipe", "{root}/recipe.yaml", "store.path={root}/old"],
        ["format 1", "make it again"],
    ),
    "an unfinished store": (
        unfinished,
        of_store("plain"),
        ["incomplete, 1 of", "run the teacher pass again"],
    ),
    "no store": (nothing, of_store("none"), ["{root}/stores/none is not a store", "spec.json"]),
    "a model for a store": (nothing, ["inspect", "{root}/model"], ["{root}/model is not a store"]),
    "a split that is not there": (
        nothing,
        ["inspect", "{root}/stores/plain", "--split", "validation"],
        ["--split validation", "has train"],
    ),
    "a plot of no vocabulary": (
        nothing,
        ["inspect", "{root}/stores/pooled", "--plot", "{root}/x.png"],
        ["--plot", "no distributions over tokens"],
    ),
    "no positions": (
        nothing,
        ["verify", "{root}/stores/plain", "--deep", "--deep-positions", "0"],
        ["--deep-positions", "at least 1"],
    ),
    "no process": (nothing, ["verify", "{root}/stores/plain", "--workers", "0"], ["--workers", "at least 1"]),
    "a rerun by another teacher": (
        nothing,
        [
            "verify",
            "{root}/stores/plain",
            "--rerun",
            "1",
            "--workers",
            "1",
            "--recipe",
            "{root}/recipe.yaml",
            "teacher.model={root}/roberta",
        ],
        ["teacher: ", "give the recipe that the store was made of (--recipe)"],
    ),
    "a rerun without a recipe": (
        remove("stores/plain/recipe.yaml"),
        ["verify", "{root}/stores/plain", "--rerun", "1", "--workers", "1"],
        ["recipe.yaml is missing", "--recipe FILE"],
    ),
    # students of a finished store
    "students inside the store": (
        nothing,
        of_store("plain", "output={root}/stores/plain"),
        ["store.path: {root}/stores/plain would hold {root}/stores/plain/tiny"],
    ),
    "no such student": (
        students(half={}, tiny={}),
        [*of_store("plain"), "--student", "tin"],
        ["no student 'tin'", "did you mean tiny?"],
    ),
    "relations of a store without replay": (
        in_recipe(corpus=None),
        of_store("plain", *RELATIONS),
        ["train.alpha_relation", "store.replay_layers: 1"],
    ),
    "heads that do not divide": (
        in_recipe(corpus=None),
        of_store("relations", *RELATIONS, "train.relation_heads=5"),
        ["train.relation_heads: 5", "divisor of 32"],
    ),
    "a layer that the student lacks": (
        in_recipe(corpus=None),
        of_store("relations", *RELATIONS, "train.relation_layer=3"),
        ["train.relation_layer", "3"],
    ),
    "weights withheld": (
        in_recipe(corpus=None),
        of_store("withheld"),
        ["student.init", "store.teacher_weights: false", "set student.init: random"],
    ),
    "a cosine without hidden states": (
        in_recipe(corpus=None),
        of_store("logits", "train.temperature=1.0"),
        ["train.alpha_cos", "set train.alpha_cos: 0"],
    ),
    "a temperature that is not there": (
        in_recipe(corpus=None),
        of_store("logits", "train.alpha_cos=0", "train.temperature=3.0"),
        ["train.temperature: 3", "[1.0, 2.0]"],
    ),
    "all positions of masked ones": (
        in_recipe(corpus=None),
        of_store("masked"),
        ["train.kl_positions: all", "set train.kl_positions: masked"],
    ),
    "logits that the store lacks": (
        in_recipe(corpus=None),
        of_store("unmasked", "train.alpha_mlm=0", "train.soft_targets=topk"),
        ["train.soft_targets: topk", "store.top_k: 64"],
    ),
    "labels of unmasked text": (
        in_recipe(corpus=None),
        of_store("unmasked"),
        ["train.alpha_mlm", "set train.alpha_mlm: 0"],
    ),
    "token losses on pooled embeddings": (
        in_recipe(corpus=None),
        of_store("pooled"),
        ["one pooled embedding per text", "store.positions: all"],
    ),
    "deeper than the teacher": (
        in_recipe(corpus=None),
        of_store("plain", "student.layers=last:5"),
        ["student.layers: last:5", "2 layers"],
    ),
    "a width that its heads do not divide": (
        in_recipe(corpus=None),
        of_store("plain", "student.hidden_size=18", "student.init=random"),
        ["student.hidden_size: 18", "4 attention heads"],
    ),
    "one bad student of two": (
        in_recipe(corpus=None, students={"half": {}, "deep": {"student": {"layers": [0, 7]}}}),
        of_store("plain"),
        ["student deep: ", "there is no layer 7"],
    ),
}


def test_there_are_enough_of_them() -> None:
    assert len(FINISHED) >= 30


@pytest.mark.parametrize("name", FINISHED)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    project: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check(project, FINISHED[name], capfd)
