"""The engine on 1 and 2 ranks, at every stage and precision, against plain AdamW, and resumed runs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import UserError
from infra.settings.sections import Train
from student_train.engine.deepspeed_config import build_config
from student_train.engine.learning_rate import layer_scales, learning_rate
from student_train.engine.world import World
from tests.student_train import engine_worker
from tests.student_train.engine_worker import data, toy

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STAGES, DTYPES = (0, 1, 2), ("float32", "bfloat16", "float16")
COMBINATIONS = list(itertools.product(STAGES, DTYPES))
DECAYED = [(0, "float32"), (1, "bfloat16"), (2, "float32")]
"""Stage and dtype of the runs whose lower layers learn more slowly."""
STEPS, HALF = 6, 3
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}


def on_one_rank(jobs: list[dict], world: World) -> dict[str, Any]:
    """Runs the jobs in this process. Returns their results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        engine_worker.adapt_deepspeed(patch)
        return {job["name"]: engine_worker.run(job, world) for job in jobs}


def on_two_ranks(jobs: list[dict], root_dir: Path) -> dict[str, Any]:
    """Runs the jobs on two ranks that a launcher starts. Returns their results."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [sys.executable, "-m", *launch, "tests.student_train.engine_worker", json.dumps(jobs)]
    done = subprocess.run(
        command, cwd=root_dir, capture_output=True, text=True, env={**os.environ}, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT")[2].splitlines()[0])


@pytest.fixture(scope="module")
def results(root_dir: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of uninterrupted and resumed runs: on one rank, on two ranks, on two after one, on one after
    two."""
    root = tmp_path_factory.mktemp("engine")
    scaling = root / "ds.json"  # so small that nothing overflows and every step is applied
    scaling.write_text(json.dumps({"fp16": {"initial_scale_power": 8}}))

    def job(name: str, stage: int, dtype: str, **more: Any) -> dict:
        kinds = {"name": name, "stage": stage, "dtype": dtype, "first": 0, "last": STEPS}
        return {**kinds, "config": str(scaling) if dtype == "float16" else None, **more}

    def whole(ranks: int) -> list[dict]:
        return [
            job(f"{ranks}-{s}-{d}", s, d, save_at=HALF, to=str(root / f"{ranks}-{s}-{d}"))
            for s, d in COMBINATIONS
        ] + [job(f"{ranks}-{s}-{d}-decay", s, d, layer_decay=0.5) for s, d in DECAYED]

    def resumed(ranks: int, source: int) -> list[dict]:
        return [
            job(f"{source}to{ranks}-{s}-{d}", s, d, first=HALF, **{"from": str(root / f"{source}-{s}-{d}")})
            for s, d in COMBINATIONS
        ]

    crossed = job("stage0to2", 2, "bfloat16", first=HALF, **{"from": str(root / "1-0-bfloat16")})
    found = on_one_rank([*whole(1), *resumed(1, 1)], world)
    found |= on_two_ranks([*whole(2), *resumed(2, 2), *resumed(2, 1), crossed], root_dir)
    return found | on_one_rank(resumed(1, 2), world)


def plain_steps(rates: dict[str, float]) -> dict[str, Any]:
    """Returns the same steps computed by torch alone, in float32. ``rates``: start of a parameter's name ->
    its learning rate."""
    model = toy()
    groups = [
        {"params": [p for name, p in model.named_parameters() if name.startswith(start)], "lr": rate}
        for start, rate in rates.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model.loss(*data(step))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(float(loss.detach()))
    weights = {name: parameter.detach().flatten().tolist() for name, parameter in model.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return plain_steps({"": 1e-2})


@pytest.fixture(scope="module")
def decayed() -> dict[str, Any]:
    return plain_steps({"norm": 1e-2, "layer.1": 5e-3, "layer.0": 2.5e-3, "embeddings": 1.25e-3})


@pytest.mark.parametrize(("stage", "dtype"), DECAYED)
@pytest.mark.parametrize("ranks", [1, 2])
def test_lower_layers_learn_more_slowly(
    results: dict, decayed: dict, reference: dict, stage: int, dtype: str, ranks: int
) -> None:
    found, tolerance = results[f"{ranks}-{stage}-{dtype}-decay"], TOLERANCE[dtype]
    assert found["losses"] == pytest.approx(decayed["losses"], rel=tolerance)
    allowed = {"float32": 2e-6, "bfloat16": 2e-3, "float16": 1e-3}[dtype]
    for name, values in decayed["weights"].items():
        assert found["weights"][name] == pytest.approx(values, abs=allowed), name
        undecayed = reference["weights"][name]
        if name.startswith(("embeddings", "layer.0")):
            assert max(abs(a - b) for a, b in zip(values, undecayed, strict=True)) > 5 * allowed


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulation_and_ranks_give_the_gradient_of_the_whole_batch(
    results: dict, reference: dict, stage: int, dtype: str, ranks: int
) -> None:
    found, tolerance = results[f"{ranks}-{stage}-{dtype}"], TOLERANCE[dtype]
    assert found["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert found["norms"] == pytest.approx(reference["norms"], rel=tolerance * 2)
    assert found["applied"] == STEPS
    if dtype == "float32":
        for name, values in reference["weights"].items():
            assert found["weights"][name] == pytest.approx(values, abs=2e-6), name


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_run_is_bit_equal(results: dict, stage: int, dtype: str, ranks: int) -> None:
    whole, resumed = results[f"{ranks}-{stage}-{dtype}"], results[f"{ranks}to{ranks}-{stage}-{dtype}"]
    assert resumed["losses"] == whole["losses"][HALF:]
    assert resumed["norms"] == whole["norms"][HALF:]
    assert resumed["weights"] == whole["weights"]


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
@pytest.mark.parametrize(("source", "ranks"), [(1, 2), (2, 1)])
def test_world_size_may_change(results: dict, stage: int, dtype: str, source: int, ranks: int) -> None:
    whole, resumed = results[f"{source}-{stage}-{dtype}"], results[f"{source}to{ranks}-{stage}-{dtype}"]
    assert resumed["losses"] == pytest.approx(whole["losses"][HALF:], rel=TOLERANCE[dtype])
    assert resumed["applied"] == STEPS


def test_stage_may_change(results: dict) -> None:
    assert results["stage0to2"]["losses"] == pytest.approx(results["1-0-bfloat16"]["losses"][HALF:], rel=2e-2)


# --- the configuration --------------------------------------------------------------------------------------


def train(**changes: Any) -> Train:
    return Train(**{"batch_size": 64, "micro_batch_size": 8, **changes})


def test_accumulation_is_what_the_ranks_leave() -> None:
    assert [build_config(train(), world)["gradient_accumulation_steps"] for world in (1, 2, 3, 8)] == [
        8,
        4,
        3,
        1,
    ]


def test_users_json_is_merged(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    user = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}, "train_batch_size": "auto"}
    path.write_text(
        json.dumps(
            {**user, "optimizer": {"type": "AdamW", "params": {"lr": 5e-4}}, "wall_clock_breakdown": True}
        )
    )
    config = build_config(train(zero_stage=1, deepspeed_config=str(path)), 2)
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert config["wall_clock_breakdown"] is True
    assert config["train_batch_size"] == 64
    assert "optimizer" not in config


@pytest.mark.parametrize(
    ("user", "names"),
    [
        ({"train_batch_size": 32}, ["train_batch_size is 32", "train.batch_size", "64"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train.micro_batch_size", "8"]),
        ({"gradient_accumulation_steps": 3}, ["gradient_accumulation_steps is 3", "4"]),
        ({"gradient_clipping": 1.0}, ["train.max_grad_norm", "5.0"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage is 3", "train.zero_stage"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is True", "train.dtype"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled is False", "train.dtype"]),
        ({"optimizer": {"type": "Lamb"}}, ["Lamb", "AdamW"]),
        ({"optimizer": {"params": {"lr": 1e-5}}}, ["optimizer.params.lr", "train.learning_rate"]),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, ["betas", "train.betas"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "train.schedule"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer"]),
        ([1], ["JSON object"]),
    ],
)
def test_conflicts_name_both(tmp_path: Path, user: Any, names: list[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(user))
    with pytest.raises(UserError) as raised:
        build_config(train(deepspeed_config=str(path)), 2)
    for name in [str(path), *names]:
        assert name in str(raised.value)


# --- the schedule -------------------------------------------------------------------------------------------


def test_scales_of_a_real_students_layers() -> None:
    names = [
        "model.bert.embeddings.word_embeddings.weight",
        "model.bert.embeddings.LayerNorm.bias",
        "model.bert.encoder.layer.0.attention.self.query.weight",
        "model.bert.encoder.layer.2.output.dense.bias",
        "model.cls.predictions.transform.dense.weight",
        "projection.weight",
    ]
    found = list(layer_scales(names, 0.5).values())
    assert found == [0.5**4, 0.5**4, 0.5**3, 0.5, 1.0, 1.0]
    assert layer_scales(["model.layers.11.mlp.Wi.weight", "model.layers.3.mlp.Wi.weight"], 0.9) == {
        "model.layers.11.mlp.Wi.weight": pytest.approx(0.9),
        "model.layers.3.mlp.Wi.weight": pytest.approx(0.9**9),
    }
    assert set(layer_scales(names, 1.0).values()) == {1.0}


def test_learning_rates() -> None:
    def rates(schedule: Any) -> list[float]:
        section = train(schedule=schedule, learning_rate=1.0, warmup_ratio=0.2)
        return [learning_rate(section, step, 10) for step in range(10)]

    assert rates("linear") == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert rates("constant") == [0.5] + [1.0] * 9
    assert rates("cosine")[6] == pytest.approx(0.5)
    assert learning_rate(train(warmup_ratio=0.0), 0, 1) == 5e-4
