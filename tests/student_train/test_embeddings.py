"""Students that learn text embeddings: the loss by its formula, and a directory for sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from student_train.engine.world import World
from student_train.objectives.objective import embedding_distance
from tests.store import synthetic
from tests.student_train.tiny_run import command, logged, make_run, student, validated

POOLED: dict[str, Any] = {"positions": "pooled", "top_k": 0, "hidden_states": "none", "masked": 0}
LOSS = [f"train.alpha_{name}=0" for name in ("ce", "mlm", "cos")] + ["train.alpha_embedding=1"]


def test_the_distance_is_the_formula() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = sum(
        1 - float(a @ b / (a.norm() * b.norm())) + float((a - b).norm() ** 2 / b.norm() ** 2)
        for a, b in zip(s, t, strict=True)
    )
    assert float(embedding_distance(s, t)) == pytest.approx(expected, rel=1e-5)
    assert float(embedding_distance(t, t)) == pytest.approx(0, abs=1e-6)
    assert float(embedding_distance(2 * t, t)) == pytest.approx(5, rel=1e-5)  # one for each: same direction


@pytest.mark.parametrize(("mode", "normalise", "width"), [("mean", False, 16), ("cls", True, 8)])
def test_a_student_of_vectors(alone: World, tmp_path: Path, mode: str, normalise: bool, width: int) -> None:
    spec = synthetic.POOLED | {"mode": mode, "normalise": normalise, "prompts": {"query": "q: "}}
    with mock.patch.object(synthetic, "POOLED", spec):
        make_run(tmp_path, **POOLED)
    shape = [f"student.hidden_size={width}", "student.dropout=0"]
    assert command(tmp_path, *LOSS, *shape, "train.epochs=4", "train.micro_batch_size=8") == 0
    lines = logged(tmp_path)
    assert lines[-1]["loss"] == lines[-1]["embedding"] < lines[0]["embedding"]
    assert set(validated(tmp_path)) == {"embedding"}

    model_dir = student(tmp_path) / "model"
    modules = [module["type"].rpartition(".")[2] for module in read(model_dir, "modules.json")]
    assert modules == ["Transformer", "Pooling", *["Dense"] * (width != 16), *["Normalize"] * normalise]
    pooling = read(model_dir, "1_Pooling/config.json")
    assert pooling["pooling_mode_cls_token"] == (mode == "cls")
    assert pooling["pooling_mode_mean_tokens"] == (mode == "mean")
    assert read(model_dir, "config_sentence_transformers.json")["prompts"] == {"query": "q: "}
    assert read(model_dir, "sentence_bert_config.json")["max_seq_length"] == 12
    assert "pipeline_tag: sentence-similarity" in (model_dir / "README.md").read_text()
    vector = by_hand(model_dir, "w6 w7 w8")
    assert vector.shape == (16,)
    assert float(vector.norm()) == pytest.approx(1.0) or not normalise
    found = measured(tmp_path, model_dir)
    assert validated(tmp_path)["embedding"] == pytest.approx(found, rel=1e-4)


def test_the_loss_is_the_mean_over_the_texts_of_a_step(alone: World, tmp_path: Path) -> None:
    """Six steps of eight texts, in micro-batches of two, with a student that hardly changes."""
    make_run(tmp_path, **POOLED, sequences=48, masking_epochs=1)
    command(tmp_path, *LOSS, "student.dropout=0", "train.epochs=1", "train.learning_rate=1e-12")
    found = [line["embedding"] for line in logged(tmp_path)]
    assert len(found) == 6
    expected = measured(tmp_path, student(tmp_path) / "model", "train")
    assert sum(found) / 6 == pytest.approx(expected, rel=1e-4)


def read(model_dir: Path, name: str) -> Any:
    return json.loads((model_dir / name).read_text())


def by_hand(model_dir: Path, text: str) -> torch.Tensor:
    """Computes what sentence-transformers does with the directory, module by module."""
    ids = AutoTokenizer.from_pretrained(model_dir)(text, return_tensors="pt").input_ids
    return vectors(model_dir, ids, torch.ones_like(ids))[0]


@torch.no_grad()
def vectors(model_dir: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    hidden = AutoModel.from_pretrained(model_dir).eval()(ids, attention_mask=mask).last_hidden_state
    x = hidden[:, 0]
    for module in read(model_dir, "modules.json"):
        kind, path = module["type"].rpartition(".")[2], module["path"]
        if kind == "Pooling" and read(model_dir, f"{path}/config.json")["pooling_mode_mean_tokens"]:
            x = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if kind == "Dense":
            x = x @ load_file(model_dir / path / "model.safetensors")["linear.weight"].T
        if kind == "Normalize":
            x = functional.normalize(x, dim=-1)
    return x


def measured(root: Path, model_dir: Path, split: str = "validation") -> float:
    """Returns the mean embedding distance of the published directory on the texts of a split."""
    from offline_teacher.store.block_reader import BlockReader
    from offline_teacher.store.store import open_store

    store = open_store(str(root / "runs" / "tiny" / "store"))
    reader = BlockReader(store, split, ["input_ids", "token_count", "embedding"])
    total = count = 0.0
    for block in range(store.splits[split].plan.blocks_per_epoch):
        columns = {name: torch.tensor(values.astype("f8")) for name, values in reader.rows(0, block).items()}
        mask = (torch.arange(12) < columns["token_count"][:, None]).long()
        found = vectors(model_dir, columns["input_ids"].long(), mask)
        total += float(embedding_distance(found, columns["embedding"]))
        count += len(mask)
    return total / count
