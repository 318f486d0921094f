"""Mistakes about a store to be made: each is one line and exit code 2, before Ray starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_stores.spoiling import (
    POOLED,
    Case,
    add_line,
    check,
    format_1,
    huge_states,
    in_recipe,
    nothing,
    settings,
    students,
    write,
)

PASS: dict[str, Case] = {
    # where the store is
    "a file for a store": (nothing, settings("store.path={root}/text.txt"), ["{root}/text.txt"]),
    "a store around the recipe's own directory": (
        nothing,
        settings("store.path={root}/runs/tiny"),
        ["store.path: {root}/runs/tiny would hold {root}/runs/tiny", "a directory of its own"],
    ),
    "a store around all outputs": (nothing, settings("store.path={root}"), ["store.path: {root} would hold"]),
    "a store of format 1": (
        format_1,
        settings("store.path={root}/old"),
        ["{root}/old", "format 1", "make it again"],
    ),
    "a store made differently": (
        nothing,
        settings("store.path={root}/stores/plain", "masking.seed=7"),
        ["{root}/stores/plain", "masking.seed: 0 -> 7", "choose another store.path"],
    ),
    "a store of another teacher": (
        nothing,
        settings("store.path={root}/stores/plain", "teacher.model={root}/roberta"),
        ["{root}/stores/plain", "teacher: ", "choose another store.path"],
    ),
    "a store that cannot be written": (nothing, settings("store.path=/proc/store"), ["/proc/store"]),
    "a password in the store's URL": (
        nothing,
        settings("store.path=s3://me:hunter2@b/store"),
        ["store.path", "environment"],
    ),
    "no corpus": (in_recipe(corpus=None), settings(), ["corpus: is required to make a store"]),
    "no teacher": (in_recipe(teacher=None), settings(), ["teacher: is required to make a store"]),
    "plan without corpus": (
        in_recipe(corpus=None),
        ["plan", "--recipe", "{root}/recipe.yaml"],
        ["corpus: is required to plan a store"],
    ),
    # what it is to hold
    "more replayed layers than there are": (
        nothing,
        settings("store.replay_layers=5"),
        ["store.replay_layers: 5", "the teacher's 2 layers"],
    ),
    "fewer replayed layers than none": (nothing, settings("store.replay_layers=-1"), ["store.replay_layers"]),
    "replay of masked positions": (
        nothing,
        settings("store.replay_layers=1", "store.positions=masked", "train.kl_positions=masked"),
        ["store.replay_layers", "set positions: all"],
    ),
    "replay of nothing": (
        nothing,
        settings("store.replay_layers=1", "store.hidden_states=none", "train.alpha_cos=0"),
        ["store.replay_layers", "hidden_states: float16"],
    ),
    "masked positions of unmasked text": (
        nothing,
        settings("store.positions=masked", "masking.probability=0", "train.kl_positions=masked"),
        ["store.positions", "masking.probability"],
    ),
    "epochs that are all the same": (
        nothing,
        settings("masking.probability=0", "masking.epochs=2"),
        ["masking.epochs: 2", "set epochs: 1"],
    ),
    "an unknown form": (nothing, settings("store.hidden_states=float8"), ["store.hidden_states", "int8"]),
    "logsumexp without T = 1": (nothing, settings("store.temperatures=[2]"), ["store.temperatures", "1.0"]),
    "more top-k than can be": (nothing, settings("store.top_k=2000"), ["store.top_k", "0 to 1024"]),
    "shards below a block": (
        nothing,
        settings("store.shard_bytes=10", "store.block_bytes=20"),
        ["store.shard_bytes: 10", "block_bytes = 20"],
    ),
    "tasks of nothing": (nothing, settings("store.task_sequences=0"), ["store.task_sequences"]),
    "two GPUs a worker": (
        nothing,
        settings("teacher.gpus_per_worker=2"),
        ["teacher.gpus_per_worker", "start more workers"],
    ),
    "states beyond float16": (
        huge_states,
        settings("teacher.dtype=float32"),
        ["store.hidden_states: float16 cannot hold", "bfloat16, or int8"],
    ),
    # families
    "an unknown family": (
        lambda root: (root / "model/config.json").write_text('{"model_type": "t5"}'),
        settings(),
        ["{root}/model/config.json", "'t5' is not a supported family", "bert", "modernbert"],
    ),
    "longer than the family's positions": (
        nothing,
        settings("teacher.model={root}/roberta", "sequences.length=65"),
        ["sequences.length: 65", "64 positions of {root}/roberta"],
    ),
    "logits of an encoder": (
        nothing,
        settings("teacher.model={root}/encoder"),
        ["store.top_k", "{root}/encoder has no masked-LM head", "set store.top_k: 0"],
    ),
    "pooled vectors of a masked LM": (
        nothing,
        settings(*POOLED),
        ["store.positions: pooled", "has no modules.json", "set it to all"],
    ),
    "pooled vectors and logits": (
        nothing,
        settings("store.positions=pooled", "sequences.packing=document"),
        ["store.positions: pooled", "top_k: 0"],
    ),
    "pooled vectors in int8": (
        nothing,
        settings(*POOLED, "teacher.model={root}/encoder", "store.hidden_states=int8"),
        ["store.hidden_states", "kept in float16"],
    ),
    "pooled vectors of packed text": (
        nothing,
        settings("store.positions=pooled", "store.top_k=0"),
        ["store.positions: pooled", "packing: document"],
    ),
    "pooled vectors of masked text": (
        nothing,
        settings(*POOLED, "teacher.model={root}/encoder", "masking.probability=0.15"),
        ["masking.probability", "set it to 0"],
    ),
    "longer than the encoder's users cut": (
        nothing,
        settings(*POOLED, "teacher.model={root}/encoder", "sequences.length=40"),
        ["sequences.length: 40", "set it to 32 at most"],
    ),
    "a pooling that is not supported": (
        write("encoder/1_Pooling/config.json", '{"pooling_mode_max_tokens": true}'),
        settings(*POOLED, "teacher.model={root}/encoder"),
        ["{root}/encoder", "max"],
    ),
    # several students
    "two students of one name": (
        add_line("students:\n  half: {}\n  half: {}\n"),
        settings(),
        ["recipe.yaml", "half"],
    ),
    "two students that differ in case": (students(Half={}, half={}), settings(), ["students", "Half, half"]),
    "a student's name is no path": (students(**{"a/b": {}}), settings(), ["students", "'a/b'"]),
    "a student with a store": (
        students(half={"store": {}}),
        settings(),
        ["students.half: unknown key store"],
    ),
    "a student's unknown setting": (
        students(half={"train": {"lerning_rate": 1}}),
        settings(),
        ["students.half", "lerning_rate", "did you mean learning_rate?"],
    ),
    "students that are a list": (in_recipe(students=["half"]), settings(), ["students", "mapping of names"]),
    "relations without replay": (
        students(half={}, small={"train": {"alpha_relation": 1}}),
        settings(),
        ["students.small.train.alpha_relation", "store.replay_layers: 1"],
    ),
    "logits that no store will hold": (
        students(half={"train": {"soft_targets": "topk"}}),
        settings("store.top_k=0"),
        ["students.half.train.soft_targets: topk", "store.top_k: 64"],
    ),
    "a student that no teacher has": (
        students(half={}, deep={"student": {"layers": [0, 4]}}),
        settings(),
        ["student.layers: there is no layer 4", "0 to 1"],
    ),
}


def test_there_are_enough_of_them() -> None:
    assert len(PASS) >= 30


@pytest.mark.parametrize("name", PASS)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    project: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check(project, PASS[name], capfd)
