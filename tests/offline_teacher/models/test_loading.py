"""Directories are read as what they are, or refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import UserError
from offline_teacher.models.loading import load_model, pooler_weights
from offline_teacher.models.weights import named_weights
from tests.offline_teacher.families.tiny_models import FAMILIES, batch, masked_lm, oracle


def edited(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_is_a_masked_lm_or_an_encoder_as_its_weights_say(
    family: str, head: bool, tmp_path: Path
) -> None:
    """In float16 on disk, which the weights fit into; ``architectures`` is not asked."""
    model = masked_lm(family)
    saved = model if head else model.base_model
    copy.deepcopy(saved).half().save_pretrained(tmp_path)
    edited(tmp_path, architectures=None)
    read = load_model(str(tmp_path))
    assert type(read) is type(saved)
    assert not read.training
    assert read.dtype == torch.float32
    ids, count = batch()
    real = torch.arange(ids.shape[1]) < count[:, None]
    found, expected = oracle(read, ids, count), oracle(saved, ids, count)
    torch.testing.assert_close(found.last_hidden[real], expected.last_hidden[real], rtol=0, atol=1e-10)
    assert (found.logits is None) != head
    assert set(named_weights(read)) == set(named_weights(saved))


def test_an_encoder_out_of_another_task_has_no_head(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model = masked_lm("bert")
    BertForSequenceClassification(model.config).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))).__name__ == "BertModel"


def test_old_modernbert_configurations_have_a_number_for_the_pattern(tmp_path: Path) -> None:
    masked_lm("modernbert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layer_types"], config["rope_parameters"]
    old = {"global_attn_every_n_layers": 2, "global_rope_theta": 7.0, "local_rope_theta": 5.0}
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    read = load_model(str(tmp_path)).config
    assert [kind[:4] for kind in read.layer_types] == ["full", "slid", "full", "slid"]
    assert read.rope_parameters["full_attention"]["rope_theta"] == 7.0


def test_two_files_and_an_index(tmp_path: Path) -> None:
    model = masked_lm("bert")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    for name, tensor in named_weights(load_model(str(tmp_path))).items():
        torch.testing.assert_close(tensor, named_weights(model)[name], rtol=0, atol=0)


LAYER = "bert.encoder.layer.0"
BAD: dict[str, tuple[Any, str]] = {
    "no directory": (lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "config.json cannot be read"),
    "another family": (lambda d: edited(d, model_type="gpt2"), "'gpt2' is not a supported family"),
    "a size that is text": (lambda d: edited(d, hidden_size="wide"), "config.json cannot be read"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "cut off": (lambda d: (d / "model.safetensors").write_bytes(b"1234567890"), "not a whole"),
    "an index of nothing": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors.index.json").write_text("{}"),
        ),
        "is not an index of weights",
    ),
    "wider": (lambda d: edited(d, intermediate_size=30), "of other shapes"),
    "shallower": (lambda d: edited(d, num_hidden_layers=2), "no place for: bert.encoder.layer.2"),
    "deeper": (lambda d: edited(d, num_hidden_layers=5), "lacks weights"),
    "relative positions": (
        lambda d: edit_weights(
            d, lambda t: t.update({f"{LAYER}.attention.self.distance_embedding.weight": torch.ones(3)})
        ),
        "no place for: bert.encoder.layer.0.attention.self.distance_embedding",
    ),
    "half a head": (
        lambda d: edit_weights(d, lambda t: t.pop("cls.predictions.transform.LayerNorm.weight")),
        "lacks weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_directory_is_one_line(what: str, tmp_path: Path) -> None:
    masked_lm("bert").save_pretrained(tmp_path)
    spoil, message = BAD[what]
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(raised.value)


def test_layers_left_over_of_an_encoder_without_a_prefix(tmp_path: Path) -> None:
    masked_lm("bert").base_model.save_pretrained(tmp_path)
    edited(tmp_path, num_hidden_layers=2)
    with pytest.raises(UserError, match="no place for: encoder.layer.2"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_a_pooler_is_read_for_those_who_fine_tune(prefix: str, tmp_path: Path) -> None:
    """By the name that a masked LM's checkpoint would give it, with or without one in the file."""
    model = masked_lm("bert")
    model.save_pretrained(tmp_path)
    assert pooler_weights(str(tmp_path), model.config) == {}
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    edit_weights(tmp_path, lambda tensors: tensors.update({f"{prefix}pooler.dense.weight": weight}))
    (name, found), *others = pooler_weights(str(tmp_path), model.config).items()
    assert (name, others) == ("bert.pooler.dense.weight", [])
    assert torch.equal(found, weight)
