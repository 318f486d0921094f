"""Every form of store by a whole pass: made, found right, and made again byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM

from infra.files import storage
from infra.settings.recipe_file import load_recipe
from offline_teacher.cluster.work_queue import Item
from offline_teacher.main import main
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.paths import WEIGHTS
from offline_teacher.store.store import Store
from offline_teacher.verification import deep
from offline_teacher.verification.rerun import rerun
from offline_teacher.verification.verify import verify
from tests.offline_teacher.local_pool import LocalPool, make
from tests.offline_teacher.stores import contents
from tests.offline_teacher.tiny_teacher import save_bert, save_roberta, write_recipe, write_text

FORMS = {
    "default": [],
    "replay 1": ["store.replay_layers=1"],
    "replay all": ["store.replay_layers=2", "store.hidden_states=bfloat16"],
    "int8": ["store.hidden_states=int8"],
    "int8, replay 1": ["store.hidden_states=int8", "store.replay_layers=1"],
    "no top-k": ["store.top_k=0", "store.replay_layers=1"],
    "logits alone": ["store.hidden_states=none", "train.alpha_cos=0"],
    "masked positions": ["store.positions=masked", "train.kl_positions=masked"],
    "masking off": ["masking.probability=0"],
    "weights withheld": ["store.teacher_weights=false", "store.replay_layers=1"],
    "frequency": ["masking.sampling=frequency", "masking.epochs=2"],
    "frequency, embeddings without tokens": ["masking.sampling=frequency", "teacher.model={root}/padded"],
    "whole words": ["masking.whole_word=true"],
    "only mask tokens": ["masking.replacement=mask", "masking.probability=0.4"],
    "bfloat16 teacher": ["teacher.dtype=bfloat16", "store.replay_layers=1"],
    "another family": ["teacher.model={root}/roberta", "store.replay_layers=1"],
    "documents": ["sequences.packing=document"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forms")
    text = write_text(root / "text.txt", 12)
    held_out = write_text(root / "held_out.txt", 4, seed=1)
    corpus = {"path": [str(text)], "validation_path": [str(held_out)]}
    model = save_bert(root / "model", scale=0.5)
    save_roberta(root / "roberta")
    save_bert(root / "padded", vocab_size=128)
    return write_recipe(root, text, model, corpus=corpus, teacher={"dtype": "float32"})


@pytest.mark.parametrize("form", FORMS)
def test_a_store_of_every_form_is_right_and_made_again_byte_for_byte(
    recipe: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [word.format(root=recipe.parent) for word in FORMS[form]]
    one, two = (make(recipe, *overrides, f"store.path={tmp_path}/{name}") for name in ("one", "two"))
    assert contents(Path(one.root)) == contents(Path(two.root))
    assert verify(one.root) == []
    assert list(deep.deep_check(one, 1000)) == []
    loaded = load_recipe(str(recipe), [*overrides, f"store.path={one.root}"])
    assert list(rerun(one, loaded, 2)) == []
    assert "rerun: 2 of 2 tasks compared byte for byte" in capsys.readouterr().out


def test_the_sizes_of_tasks_are_tokens(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On which their durations depend, and with them their deadlines."""
    run, sizes = LocalPool.run, {"train": 0.0, "validation": 0.0}

    def recorded(self: LocalPool, items: list[Item], *arguments: Any) -> list[Item]:
        for item in items:
            if item.method == "infer":
                sizes[item.arguments[0]] += item.size
        return run(self, items, *arguments)

    monkeypatch.setattr(LocalPool, "run", recorded)
    store = make(recipe, "sequences.packing=document", f"store.path={tmp_path}/store")
    for split, size in sizes.items():
        tasks = range(store.splits[split].plan.task_count)
        assert size == pytest.approx(sum(store.task_index(split, task).tokens for task in tasks))


def test_withheld_weights_are_those_of_replay_alone(recipe: Path, tmp_path: Path) -> None:
    stores = {
        name: make(
            recipe, "store.replay_layers=1", f"store.teacher_weights={whole}", f"store.path={tmp_path}/{name}"
        )
        for name, whole in (("whole", "true"), ("top", "false"))
    }
    whole, top = (set(load_file(storage.join(store.root, *WEIGHTS.split("/")))) for store in stores.values())
    assert top < whole
    layers = {name.split("layer.")[1].split(".")[0] for name in top if "layer." in name}
    assert layers == {"1"}
    assert not any("position_embeddings" in name for name in top)


def test_a_store_on_an_object_store_is_the_same(recipe: Path, tmp_path: Path, bucket: str) -> None:
    """Made there, verified there, and read there; a finished one is left alone."""
    local = make(recipe, "store.replay_layers=1", f"store.path={tmp_path}/store")
    remote = make(recipe, "store.replay_layers=1", f"store.path={bucket}/stores/store")
    assert remote.digest == local.digest
    names = ["input_ids", "hidden_states", "topk_ids"]
    for split in ("train", "validation"):
        there, here = (BlockReader(store, split, names).rows(0, 0) for store in (remote, local))
        assert all(np.array_equal(there[name], here[name]) for name in names)
    assert main(["verify", remote.root, "--deep", "--workers", "1"]) == 0
    assert main(["inspect", remote.root, "--sample", "3"]) == 0
    assert make(recipe, "store.replay_layers=1", f"store.path={remote.root}").digest == local.digest


def test_the_pass_and_verify_on_an_object_store_mend_what_is_gone(
    recipe: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offline_teacher.verification import repair
    from tests.offline_teacher.local_pool import LocalCluster

    monkeypatch.setattr(repair, "Cluster", LocalCluster)
    store = make(recipe, f"store.path={bucket}/store")
    for name in ("tasks/train/e000-p00000-0000.json", "tokenizer/tokenizer.json"):
        storage.remove(storage.join(store.root, *name.split("/")))
    command = ["verify", store.root, "--workers", "1"]
    assert main(command) == 3
    assert main([*command, "--repair"]) == 0
    assert Store(store.root, store.spec, store.manifest).digest == store.digest
    assert verify(store.root) == []


def test_pooled_vectors_are_those_of_the_live_encoder(recipe: Path, tmp_path: Path) -> None:
    """Mean over the tokens, normalised; a text a row, cut at the length, its prompt before it."""
    encoder = tmp_path / "encoder"
    model, tokenizer = recipe.parent / "model", AutoTokenizer.from_pretrained(recipe.parent / "model")
    BertForMaskedLM.from_pretrained(model).bert.save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    (encoder / "1_Pooling").mkdir()
    (encoder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (encoder / "modules.json").write_text(json.dumps(modules))
    prompts = {"prompts": {"query": "bab dob "}, "default_prompt_name": "query"}
    (encoder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    pooled = [
        "store.positions=pooled",
        "store.top_k=0",
        "sequences.packing=document",
        f"teacher.model={encoder}",
    ]
    store = make(recipe, *pooled, f"store.path={tmp_path}/store")
    assert verify(store.root) == []
    assert store.pooling() is not None
    reader = BlockReader(store, "train", ["embedding"])
    blocks = range(store.splits["train"].plan.blocks_per_epoch)
    found = np.concatenate([reader.rows(0, block)["embedding"] for block in blocks]).astype(np.float64)
    texts = (recipe.parent / "text.txt").read_text().splitlines()
    assert found.shape == (len(texts), 32)
    live = AutoModel.from_pretrained(encoder).eval()
    for vector, text in zip(found, texts, strict=True):
        tokens = tokenizer.encode(f"bab dob {text}", add_special_tokens=False)[:14]
        ids = torch.tensor([[tokenizer.cls_token_id, *tokens, tokenizer.sep_token_id]])
        expected = live(ids).last_hidden_state[0].mean(0).detach().double().numpy()
        assert vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected) > 0.99999
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-3)
    shutil.rmtree(encoder)  # the store is complete in itself
    assert main(["inspect", store.root, "--sample", "2"]) == 0
