"""The arms of ``arms.yaml``: each is a recipe, a number of steps and a number of seeds."""

from __future__ import annotations

import copy
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.cpu.processor import computes_bfloat16
from infra.files import storage
from offline_teacher.sequences.masking import masked_count
from offline_teacher.store.schema import Layout

FILE = Path(__file__).with_name("arms.yaml")
REFERENCE = "replay 1"
"""Name of the arm on whose store every student is measured."""
CHARACTERS_PER_TOKEN = 5
"""More than the average of English text, so that an arm of the size's number of tokens reads no sequence
twice, unless its store has a part of the text."""


@dataclass(frozen=True)
class Arm:
    """One way to train a student."""

    name: str
    student: dict[str, Any]
    train: dict[str, Any]
    store: str
    seeds: int
    steps: int | None
    """Number of steps. None: as many as the size's number of tokens needs; 0: the student is not trained."""
    renormalised: bool
    """Whether top-k probabilities are divided by their sum, as in other programs, so that the tail is
    lost."""
    time_of: str | None
    """Name of the arm whose training time this arm gets, instead of an equal number of tokens."""
    is_teacher: bool
    """Whether the teacher itself is scored, and nothing is trained."""


class Plan:
    """The arms and tables for one size of ``arms.yaml``."""

    def __init__(self, size: str, text: dict[str, Path], teacher: Path, directory: Path) -> None:
        """``text``: split -> text file. ``directory``: directory of recipes, stores and students."""
        self.file: dict[str, Any] = yaml.safe_load(FILE.read_text())
        self.size = self.file["sizes"][size]
        self.text, self.teacher, self.directory = text, teacher, directory
        self.arms = {name: self._arm(name, settings) for name, settings in self.file["arms"].items()}
        self.tables: dict[str, list[str]] = self.file["tables"]
        needed = {name for title in self.size["tables"] for name in self.tables[title]}
        self.needed = [name for name in self.arms if name in needed]
        """Names of the arms that the tables of this size need."""
        for name in (name for names in self.tables.values() for name in names):
            assert name in self.arms, f"{FILE}: no arm is called {name!r}"

    def _arm(self, name: str, settings: dict[str, Any]) -> Arm:
        fields: dict[str, Any] = {
            "student": {}, "train": {}, "store": REFERENCE, "seeds": 1, "steps": None,
            "renormalised": False, "time_of": None, "is_teacher": False, "narrow": False,
        }  # fmt: skip
        assert settings.keys() <= fields.keys(), f"{FILE}: {name}: {settings.keys() - fields.keys()}"
        fields |= {**settings, "seeds": min(settings.get("seeds", 1), self.size.get("seeds", 5))}
        if fields.pop("narrow"):
            fields["student"] = {**self.size["narrow"], **fields["student"]}
        return Arm(name, **fields)

    @property
    def tokens(self) -> int:
        """Number of training tokens of an arm, unless it has ``steps`` or ``time_of``."""
        return int(self.size["steps"] * self.size["batch_size"] * self.size["length"])

    def part_of_text(self, share: float) -> Path:
        """Returns the path of the training text, or of evenly spaced lines of it, about ``share`` of them."""
        whole = self.text["train"]
        if share == 1.0:
            return whole
        path = whole.with_stem(f"{whole.stem}-{share:g}")
        lines = whole.read_text().splitlines(keepends=True)
        storage.publish_if_changed(str(path), "".join(lines[:: round(1 / share)]).encode())
        return path

    def recipe(self, arm: Arm, seed: int, steps: int) -> str:
        """Writes the recipe of one run, and returns its path."""
        base, size = copy.deepcopy(self.file["base"]), self.size
        store = {**base["store"], **self.file["stores"][arm.store]}
        masking = {"probability": 0.15, **store.pop("masking", {})}
        text = self.part_of_text(store.pop("text_share", 1.0))
        sample = bytes_per_sample(store, masking["probability"], size["length"], self.teacher)
        block = {"block_bytes": size["block_samples"] * sample}
        name = f"{slug(arm.name)}-{seed}"
        sections = {
            **base,
            "name": name,
            "output": str(self.directory / "runs"),
            "corpus": {"path": str(text), "validation_path": str(self.text["validation"])},
            "sequences": {"length": size["length"]},
            "masking": masking,
            "teacher": {**base["teacher"], "model": str(self.teacher), "dtype": dtype()},
            "store": {**store, **block, "path": str(self.directory / "stores" / slug(arm.store))},
            "student": {**base["student"], "layers": size["layers"], **arm.student},
            "train": {
                "dtype": dtype(), **train_settings(self.file, size, arm.train),
                "epochs": 1000.0, "max_steps": max(steps, 1), "seed": seed,
            },
        }  # fmt: skip
        sections["train"]["micro_batch_size"] = sections["train"]["batch_size"]
        path = self.directory / "recipes" / f"{name}.yaml"
        storage.publish_if_changed(str(path), yaml.safe_dump(sections, sort_keys=False).encode())
        return str(path)


def train_settings(file: dict[str, Any], size: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    """Returns the ``train`` section for an arm. ``file``: ``arms.yaml``; ``size``: one of its sizes; ``arm``:
    the arm's own ``train`` section."""
    return {"batch_size": size["batch_size"], **file["base"]["train"], **size.get("train", {}), **arm}


def dtype() -> str:
    """Returns the dtype of teacher and students: bfloat16 if this processor has it, else float32."""
    return "bfloat16" if computes_bfloat16() else "float32"


def slug(name: str) -> str:
    """Returns a name for files: ``replay-1-int8`` for ``replay 1, int8``."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def bytes_per_sample(store: dict[str, Any], probability: float, length: int, teacher: Path) -> int:
    """Returns the bytes per sample of a store with this share of masked tokens. ``Plan.recipe`` uses them to
    give all stores blocks of equally many samples, and so one order of samples."""
    config = json.loads((teacher / "config.json").read_text())
    return Layout(
        length=length,
        masked=masked_count(length, probability),
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        top_k=store["top_k"],
        temperatures=(1.0, 2.0) if store["top_k"] else (),
        hidden_states=store.get("hidden_states", "float16"),
        positions="all",
        replay_layers=store["replay_layers"],
        teacher_weights=True,
    ).bytes_per_sample()


def cut_text(sources: list[Path], characters: int) -> list[str]:
    """Returns the first lines of every source; ``.gz`` is decompressed. The sources have equal shares of
    ``characters``; the line in which a share ends is complete. Blank lines are left out."""
    lines = []
    for path in sources:
        left = characters // len(sources)
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for line in file:
                if left <= 0:
                    break
                if line.strip():
                    lines.append(line.rstrip("\n"))
                    left -= len(line)
    return lines
