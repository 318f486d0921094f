"""Mistakes in a recipe, a loss or a directory: one clear line, nothing trained, nothing half-written."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from infra.errors import UserError
from student_train.engine import world as worlds
from student_train.engine.world import World
from tests.student_train import test_bad_store, test_phases
from tests.student_train.bad_stores import (
    RELATIONS,
    Cases,
    all_checkpoints_damaged,
    deepspeed_json,
    file_in_the_way,
    hostile_pooling,
    no_recipe,
    nothing,
    packed_texts,
    recipe_with,
    refuses,
    started,
    store_of,
)
from tests.student_train.tiny_run import command

RECIPE: Cases = {
    "no recipe": (no_recipe, [], ["recipe.yaml"]),
    "unknown key": (nothing, ["train.lerning_rate=1"], ["lerning_rate", "learning_rate"]),
    "wrong type": (nothing, ["train.batch_size=many"], ["train.batch_size"]),
    "out of range": (nothing, ["train.epochs=0"], ["epochs"]),
    "not an override": (nothing, ["train"], ["train"]),
    "batch not divisible": (nothing, ["train.batch_size=7"], ["batch_size", "micro_batch_size"]),
    "negative seed": (nothing, ["train.seed=-1"], ["train", "seed: must be >= 0", "not -1"]),
    "no loss": (nothing, RELATIONS[:3], ["no loss"]),
    "no relation": (nothing, ["train.relation_weights=[0, 0, 0]"], ["relation_weights", "not all 0"]),
    "less than no time": (nothing, ["train.checkpoint_minutes=-1"], ["checkpoint_minutes", ">= 0"]),
    "no such student": (nothing, ["--student", "studnet"], ["'studnet'", "did you mean student?"]),
    "two students of one name": (
        recipe_with(students={"half": {}, "Half": {}}), [], ["Half, half", "upper and lower case"],
    ),
    "a student that is no mapping": (recipe_with(students={"half": 3}), [], ["students.half", "mapping"]),
    "a student's unknown section": (
        recipe_with(students={"half": {"trian": {}}}), [], ["students.half", "did you mean train?"],
    ),
    "a student's unknown key": (
        recipe_with(students={"half": {"train": {"epoch": 1}}}), [], ["students.half", "mean epochs?"],
    ),
    "an override of no student": (
        recipe_with(students={"half": {}}), ["students.haf.train.seed=1"], ["haf", "did you mean half?"],
    ),
}  # fmt: skip

LOSS: Cases = {
    "teacher's weights withheld": (
        store_of(teacher_weights=False), [], ["student.init is teacher", "teacher_weights: false", "random"],
    ),
    "exact without hidden states": (
        store_of(hidden_states="none"),
        ["train.soft_targets=exact", "train.alpha_cos=0"],
        ["train.soft_targets", "hidden states"],
    ),
    "cosine without hidden states": (
        store_of(hidden_states="none"), [], ["train.alpha_cos", "hidden states"],
    ),
    "topk without top-k": (store_of(top_k=0), ["train.soft_targets=topk"], ["train.soft_targets", "top-k"]),
    "temperature not stored": (
        nothing,
        ["train.soft_targets=topk", "train.temperature=3"],
        ["train.temperature: 3", "[1.0, 2.0]"],
    ),
    "all positions of a masked store": (store_of(positions="masked"), [], ["kl_positions", "masked"]),
    "relations without replayed layers": (nothing, RELATIONS, ["train.alpha_relation", "replay_layers: 1"]),
    "masked LM of text that is not masked": (store_of(masked=0), [], ["train.alpha_mlm", "not masked"]),
    "masked positions of text that is not masked": (
        store_of(masked=0), ["train.alpha_mlm=0", "train.kl_positions=masked"], ["kl_positions: masked"],
    ),
    "one vector a text": (
        store_of(positions="pooled", top_k=0, hidden_states="none", masked=0),
        [],
        ["pooled", "positions: all"],
    ),
    "vectors beside another term": (
        store_of(positions="pooled", top_k=0, hidden_states="none", masked=0),
        ["train.alpha_ce=0", "train.alpha_mlm=0", "train.alpha_embedding=1"],
        ["train.alpha_cos", "pooled", "train.alpha_embedding: 1"],
    ),
    "vectors of a teacher that makes none": (
        nothing, ["train.alpha_embedding=1"], ["train.alpha_embedding", "not a sentence encoder"],
    ),
    "vectors of sequences that are no texts": (
        packed_texts, ["train.alpha_embedding=1"], ["train.alpha_embedding", "packing: document"],
    ),
    "vectors of masked positions": (
        store_of(positions="masked"),
        ["train.alpha_embedding=1", "train.kl_positions=masked"],
        ["train.alpha_embedding", "positions: all"],
    ),
    "vectors made in no known way": (
        hostile_pooling(mode="max", normalise=True, prompts={}, default_prompt=None, max_length=None),
        [*RELATIONS[:3], "train.alpha_embedding=1"], ["pooling.json", "'max'"],
    ),
    "vectors of which nothing is said": (
        hostile_pooling(mode="mean"), [*RELATIONS[:3], "train.alpha_embedding=1"], ["pooling.json"],
    ),
}  # fmt: skip
"""What a loss needs of the store."""

LIVE: Cases = {
    "an unknown teacher": (nothing, ["train.teacher=both"], ["train.teacher", "store", "live"]),
    "a live teacher's top-k": (
        nothing, ["train.teacher=live", "train.soft_targets=topk"], ["soft_targets: topk", "exact"],
    ),
    "a live teacher whose weights are withheld": (
        store_of(teacher_weights=False),
        ["train.teacher=live", "student.init=random"],
        ["train.teacher: live", "teacher_weights: false", "train.teacher: store"],
    ),
    "a live teacher of text that is not masked": (
        store_of(masked=0), ["train.teacher=live"], ["train.alpha_mlm", "not masked"],
    ),
}  # fmt: skip
"""A live teacher."""

STUDENT: Cases = {
    "deeper than its teacher": (nothing, ["student.layers=last:5"], ["last:5", "2 layers"]),
    "no such layer": (nothing, ["student.layers=[0, 7]"], ["layer 7"]),
    "width and heads": (nothing, ["student.hidden_size=9", "student.init=random"], ["hidden_size", "heads"]),
    "wider than the teacher's layers": (
        nothing, ["student.hidden_size=32"], ["student.hidden_size: 32", "teacher's 16", "init: random"],
    ),
    "heads that cannot be cut out of the teacher's": (
        nothing,
        ["student.hidden_size=12", "student.attention_heads=1"],
        ["student.attention_heads", "init: random"],
    ),
    "no neurons": (nothing, ["student.intermediate_size=0"], ["intermediate_size", ">= 1"]),
    "relation heads that do not divide": (
        store_of(replay_layers=1), [*RELATIONS, "train.relation_heads=3"], ["train.relation_heads: 3", "16"],
    ),
    "no such layer of relations": (
        store_of(replay_layers=1), [*RELATIONS, "train.relation_layer=4"], ["no layer 4", "1 layers"],
    ),
    "no such layer of the teacher": (
        store_of(replay_layers=1),
        [*RELATIONS, "train.relation_teacher_layer=-2"],
        ["train.relation_teacher_layer: -2", "-1 to -1"],
    ),
    "no such layer of relations from the end": (
        store_of(replay_layers=1), [*RELATIONS, "train.relation_layer=-2"], ["train.relation_layer", "-2"],
    ),
}  # fmt: skip
"""Its shape."""

RUN: Cases = {
    "loss not finite": (
        nothing,
        ["train.learning_rate=1e30", "train.warmup_ratio=0", "train.checkpoint_every=1"],
        ["step 1", "not a finite number", "part/row", "checkpoints/step-00000001"],
    ),
    "loss not finite at stage 2": (
        nothing,
        ["train.learning_rate=1e30", "train.warmup_ratio=0", "train.zero_stage=2", "train.dtype=bfloat16"],
        ["not a finite number", "no checkpoint was written yet"],
    ),
    "output in the way": (file_in_the_way, [], ["students/student"]),
    "no DeepSpeed JSON": (nothing, ["train.deepspeed_config=absent.json"], ["absent.json"]),
    "DeepSpeed JSON is not JSON": (
        deepspeed_json("{"), ["train.deepspeed_config={root}/ds.json"], ["ds.json"],
    ),
    "DeepSpeed JSON contradicts": (
        deepspeed_json('{"gradient_clipping": 1}'),
        ["train.deepspeed_config={root}/ds.json"],
        ["gradient_clipping is 1", "train.max_grad_norm"],
    ),
    "DeepSpeed JSON that moves the optimiser": (
        deepspeed_json('{"zero_optimization": {"cpu_offload": true}}'),
        ["train.deepspeed_config={root}/ds.json", "train.zero_stage=2"],
        ["ds.json", "zero_optimization.cpu_offload is not supported"],
    ),
    "DeepSpeed JSON with a wrong type": (
        deepspeed_json('{"zero_optimization": {"reduce_bucket_size": "many"}}'),
        ["train.deepspeed_config={root}/ds.json"],
        ["ds.json: DeepSpeed refuses it", "reduce_bucket_size"],
    ),
    "DeepSpeed JSON that does not fit the stage": (
        deepspeed_json('{"data_types": {"grad_accum_dtype": "fp32"}}'),
        ["train.deepspeed_config={root}/ds.json", "train.dtype=bfloat16"],
        ["ds.json: DeepSpeed refuses it"],
    ),
    "float16 where it cannot be": (nothing, ["train.dtype=float16"], ["float16", "bfloat16"]),
    "other settings than at its start": (
        started(), ["train.epochs=1", "train.seed=1"], ["(train.seed: 0 -> 1)"],
    ),
    "another store than at its start": (
        started(then=store_of(sequences=40)), ["train.epochs=1"], ["store: 'xxh3-128:"],
    ),
    "no valid checkpoint": (
        started(then=all_checkpoints_damaged), ["train.epochs=1"], ["no valid checkpoint is left"],
    ),
}  # fmt: skip

BAD = {**RECIPE, **LOSS, **LIVE, **STUDENT, **RUN}


def test_there_are_enough_kinds_of_bad_input() -> None:
    """The numbers of tested mistakes do not fall."""
    assert len(LOSS) + len(LIVE) + len(STUDENT) + len(test_phases.BAD) >= 35
    assert len(test_bad_store.HOSTILE) >= 20
    assert len(BAD) + len(test_bad_store.BAD) + len(test_phases.BAD) >= 100


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(
    alone: World, run_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    refuses(run_dir, BAD[name])


def test_more_ranks_than_samples(
    alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worlds, "start_world", lambda: World(0, 51, torch.device("cpu")))
    assert command(run_dir) == 2
    assert capsys.readouterr().err.startswith("error: 51 ranks are too many for the store of 50 sequences")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_that_another_program_has(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"--master_port: another program uses port {port}"):
            worlds.start_world()
