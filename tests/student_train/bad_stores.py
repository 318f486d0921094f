"""Ways to damage a recipe, a store or a directory, and the check that a command refuses it in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

from infra.errors import UserError
from offline_teacher.models.weights import named_weights
from offline_teacher.store import writer
from tests.store import synthetic
from tests.student_train import tiny_run
from tests.student_train.tiny_run import command, make_store, make_teacher, student

POOLED = {"positions": "pooled", "top_k": 0, "hidden_states": "none", "masked": 0}
RELATIONS = ["train.alpha_ce=0", "train.alpha_mlm=0", "train.alpha_cos=0", "train.alpha_relation=1"]
Cases = dict[str, tuple[Callable[[Path], None], list[str], list[str]]]
"""Name -> what is done to recipe and store, the command's words, what its error says."""


def refuses(root: Path, case: tuple[Callable[[Path], None], list[str], list[str]]) -> None:
    prepare, words, named = case
    prepare(root)
    there = (student(root) / "model").exists()
    with pytest.raises(UserError) as raised:
        command(root, *(word.replace("{root}", str(root)) for word in words))
    line = str(raised.value)
    assert "\n" not in line
    for part in named:
        assert part.replace("{root}", str(root)) in line
    assert (student(root) / "model").exists() == there


def store(root: Path) -> Path:
    return root / "runs" / "tiny" / "store"


def nothing(root: Path) -> None: ...


def no_recipe(root: Path) -> None:
    (root / "recipe.yaml").unlink()


def recipe_with(**sections: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "recipe.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | sections))

    return change


def no_store(root: Path) -> None:
    shutil.rmtree(store(root))


def store_of(**layout: Any) -> Callable[[Path], None]:
    def rebuild(root: Path) -> None:
        no_store(root)
        make_store(store(root), make_teacher(), **layout)

    return rebuild


def format_1(root: Path) -> None:
    no_store(root)
    store(root).mkdir()
    (store(root) / "declaration.json").write_text("{}")


def incomplete(root: Path) -> None:
    (store(root) / "manifest.json").unlink()
    next((store(root) / "tasks" / "train").iterdir()).unlink()


def half_a_manifest(root: Path) -> None:
    path = store(root) / "manifest.json"
    path.write_bytes(path.read_bytes()[:-30])


def flipped(pattern: str) -> Callable[[Path], None]:
    """Flips a bit in the middle of every file of the store whose path matches."""

    def flip(root: Path) -> None:
        paths = sorted(store(root).glob(pattern))
        assert paths
        for path in paths:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(bytes(data))

    return flip


def shards_gone(root: Path) -> None:
    shutil.rmtree(store(root) / "shards" / "train")


def impossible(column: str, value: int) -> Callable[[Path], None]:
    """Makes a store with valid digests and impossible numbers, as a faulty writer would."""

    def rebuild(root: Path) -> None:
        real = writer.TaskWriter.write

        def write(self: Any, columns: dict[str, np.ndarray]) -> None:
            columns[column].flat[0] = value
            real(self, columns)

        with (
            mock.patch.object(writer.TaskWriter, "write", write),
            mock.patch.object(writer, "check_block", return_value=()),
        ):
            store_of()(root)

    return rebuild


def packed_texts(root: Path) -> None:
    """Makes a sentence encoder's store whose sequences are cut out of running text."""
    store_of(documents=True, fingerprint={"recipe": {"sequences": {"packing": "stream"}}})(root)


def teacher_without_a_head(root: Path) -> None:
    kept = named_weights(make_teacher().bert)
    no_store(root)
    with mock.patch.object(tiny_run, "named_weights", return_value=kept):
        make_store(store(root), make_teacher())


def hostile(
    change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None, **config: Any
) -> Callable[[Path], None]:
    """Makes a store with valid digests whose teacher has wrong tensors or another configuration."""

    def rebuild(root: Path) -> None:
        teacher = make_teacher()
        tensors = {name: tensor.detach().clone() for name, tensor in named_weights(teacher).items()}
        change(tensors)
        told = {**teacher.config.to_dict(), **config}
        no_store(root)
        with (
            mock.patch.object(tiny_run, "named_weights", return_value=tensors),
            mock.patch.object(type(teacher.config), "to_dict", return_value=told),
        ):
            make_store(store(root), teacher)

    return rebuild


def hostile_file(data: bytes) -> Callable[[Path], None]:
    """Replaces the file of the teacher's weights."""

    def rebuild(root: Path) -> None:
        no_store(root)
        with mock.patch.object(synthetic, "save", return_value=data):
            make_store(store(root), make_teacher())

    return rebuild


def hostile_pooling(**told: Any) -> Callable[[Path], None]:
    def rebuild(root: Path) -> None:
        with mock.patch.object(synthetic, "POOLED", told):
            store_of(**POOLED)(root)

    return rebuild


def file_in_the_way(root: Path) -> None:
    student(root).parent.mkdir()
    student(root).write_text("in the way")


def deepspeed_json(text: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / "ds.json").write_text(text)

    return write


def started(*overrides: str, then: Callable[[Path], None] = nothing) -> Callable[[Path], None]:
    def train(root: Path) -> None:
        command(root, "train.epochs=1", *overrides)
        then(root)

    return train


def all_checkpoints_damaged(root: Path) -> None:
    shutil.rmtree(student(root) / "model")
    for path in (student(root) / "checkpoints").glob("*/weights.safetensors"):
        path.write_bytes(b"")
