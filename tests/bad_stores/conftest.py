"""Small stores that real passes made, and a copy of them to be spoiled."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertForMaskedLM

from student_train.engine.world import World
from tests.bad_stores.spoiling import POOLED
from tests.offline_teacher.local_pool import make
from tests.offline_teacher.tiny_teacher import save_bert, save_roberta, write_recipe, write_text

STORES = {
    "plain": [],
    "relations": ["store.replay_layers=1"],
    "withheld": ["store.teacher_weights=false"],
    "logits": ["store.hidden_states=none", "train.alpha_cos=0"],
    "masked": ["store.positions=masked", "train.kl_positions=masked"],
    "unmasked": ["masking.probability=0", "store.top_k=0"],
}
"""Stores of one teacher and text."""


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, three teachers, a recipe, and finished stores in ``stores``."""
    root = tmp_path_factory.mktemp("good")
    text = write_text(root / "text.txt", 12)
    recipe = write_recipe(root, text, save_bert(root / "model"), train={"dtype": "float32"})
    save_roberta(root / "roberta")
    save_encoder(root / "encoder", root / "model")
    for name, overrides in STORES.items():
        make(recipe, f"store.path={root}/stores/{name}", *overrides)
    make(recipe, f"store.path={root}/stores/pooled", f"teacher.model={root}/encoder", *POOLED)
    return root


@pytest.fixture
def project(good: Path, tmp_path: Path) -> Path:
    """The same in a directory of its own, to be spoiled."""
    root = tmp_path / "p"
    shutil.copytree(good, root)
    for path in (root / "recipe.yaml", *root.glob("stores/*/recipe.yaml")):
        path.write_text(path.read_text().replace(str(good), str(root)))
    return root


@pytest.fixture(autouse=True)
def no_ray(alone: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    monkeypatch.setattr("student_train.main._train_all", lambda *_, **__: pytest.fail("training was started"))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def save_encoder(directory: Path, model: Path) -> None:
    """A sentence encoder: the encoder of a masked LM, and how its vectors are pooled."""
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    BertForMaskedLM.from_pretrained(model).bert.save_pretrained(directory)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32}))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
