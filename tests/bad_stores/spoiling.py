"""What a user does wrong about stores, families and several students, and what must come of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from infra.console import command
from offline_teacher.main import main
from student_train.main import parse
from student_train.main import run as train
from tests.offline_teacher.stores import contents

Spoil = Callable[[Path], object]
Case = tuple[Spoil, list[str], list[str]]

RELATIONS = ["train.alpha_ce=0", "train.alpha_mlm=0", "train.alpha_cos=0", "train.alpha_relation=1"]
POOLED = ["store.positions=pooled", "store.top_k=0", "sequences.packing=document"]


def nothing(root: Path) -> None: ...


def write(name: str, content: str) -> Spoil:
    return lambda root: (root / name).write_text(content)


def remove(name: str) -> Spoil:
    return lambda root: (root / name).unlink()


def flip(pattern: str) -> Spoil:
    """A bit of the first file that fits."""

    def spoil(root: Path) -> None:
        path = min(root.glob(pattern))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)

    return spoil


def unfinished(root: Path) -> None:
    (root / "stores/plain/manifest.json").unlink()
    min((root / "stores/plain/tasks/train").glob("*.json")).unlink()


def another_manifest(root: Path) -> None:
    shutil.copy(root / "stores/relations/manifest.json", root / "stores/plain/manifest.json")


def format_1(root: Path) -> None:
    (root / "old").mkdir()
    for name in ("declaration.json", "manifest.json"):
        (root / "old" / name).write_text("{}")


def huge_states(root: Path) -> None:
    path = root / "model/model.safetensors"
    weights = load_file(path)
    weights["bert.encoder.layer.1.output.LayerNorm.bias"] += 1e6
    save_file(weights, path, {"format": "pt"})


def in_recipe(**sections: object) -> Spoil:
    """Sections of the recipe replaced; None: left out."""

    def spoil(root: Path) -> None:
        values = {**yaml.safe_load((root / "recipe.yaml").read_text()), **sections}
        kept = {name: value for name, value in values.items() if value is not None}
        (root / "recipe.yaml").write_text(yaml.safe_dump(kept))

    return spoil


def add_line(line: str) -> Spoil:
    return lambda root: (root / "recipe.yaml").write_text((root / "recipe.yaml").read_text() + line)


def students(**named: object) -> Spoil:
    return in_recipe(students=named)


def settings(*overrides: str) -> list[str]:
    return ["run", "--recipe", "{root}/recipe.yaml", *overrides]


def of_store(name: str, *overrides: str) -> list[str]:
    """Training from a finished store, without corpus and teacher."""
    return ["train", "--recipe", "{root}/recipe.yaml", f"store.path={{root}}/stores/{name}", *overrides]


def check(project: Path, case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """Asserts exit code 2 and one line that says where and what to do, and that nothing is written."""
    spoil, words, named = case
    spoil(project)
    arguments = [word.format(root=project) for word in words]
    before = contents(project)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        command(lambda: train(parse(arguments[1:])) if arguments[0] == "train" else main(arguments))
    printed = capfd.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2, printed
    assert len(errors) == 1, printed.err
    assert "Traceback" not in printed.out + printed.err
    assert "hunter2" not in errors[0]
    for part in named:
        assert part.format(root=project) in errors[0]
    assert contents(project) == before
