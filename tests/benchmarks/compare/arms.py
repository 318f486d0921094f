"""The arms of ``arms.yaml``: each is a recipe, a number of steps and a number of seeds."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.files import storage
from offline_teacher.sequences.masking import masked_count
from offline_teacher.store.schema import Layout

FILE = Path(__file__).with_name("arms.yaml")
REFERENCE = "replay 1"
"""The store on which every student is measured, and the arm whose time is the measure of equal time."""
CHARACTERS_PER_TOKEN = 5
"""More than English text has, so that no run reads a sequence twice."""


@dataclass(frozen=True)
class Arm:
    """One way to train a student."""

    name: str
    student: dict[str, Any]
    train: dict[str, Any]
    store: str
    seeds: int
    steps: int | None
    """None: as many as all; 0: the student's first weights."""
    renormalised: bool
    """Top-k probabilities are divided by their sum, as other programs do, and the tail is left out."""
    time_of: str | None
    """Train for as long as this arm took with the same seed, instead of equal tokens."""


class Plan:
    """What is run for one size."""

    def __init__(self, size: str, text: dict[str, Path], teacher: Path, directory: Path) -> None:
        """``text``: the files with training and held-out text. ``directory``: where all is made."""
        self.file: dict[str, Any] = yaml.safe_load(FILE.read_text())
        self.size = self.file["sizes"][size]
        self.text, self.teacher, self.directory = text, teacher, directory
        self.arms = {name: self._arm(name, settings) for name, settings in self.file["arms"].items()}
        self.tables: dict[str, list[str]] = self.file["tables"]
        for name in (name for names in self.tables.values() for name in names):
            assert name in self.arms, f"{FILE}: no arm is called {name!r}"

    def _arm(self, name: str, settings: dict[str, Any]) -> Arm:
        fields: dict[str, Any] = {
            "student": {}, "train": {}, "store": REFERENCE, "seeds": 1, "steps": None,
            "renormalised": False, "time_of": None, "narrow": False,
        }  # fmt: skip
        assert settings.keys() <= fields.keys(), f"{FILE}: {name}: {settings.keys() - fields.keys()}"
        fields |= {**settings, "seeds": min(settings.get("seeds", 1), self.size.get("seeds", 5))}
        if fields.pop("narrow"):
            fields["student"] = {**self.size["narrow"], **fields["student"]}
        return Arm(name, **fields)

    @property
    def tokens(self) -> int:
        """Tokens an arm sees, if the time is not what is equal."""
        return int(self.size["steps"] * self.size["batch_size"] * self.size["length"])

    def recipe(self, arm: Arm, seed: int, steps: int) -> str:
        """Writes the recipe of one run, and returns its path."""
        base, size = copy.deepcopy(self.file["base"]), self.size
        store = {**base["store"], **self.file["stores"][arm.store]}
        block = {"block_bytes": size["block_samples"] * bytes_per_sample(store, size["length"], self.teacher)}
        name = f"{slug(arm.name)}-{seed}"
        sections = {
            **base,
            "name": name,
            "output": str(self.directory / "runs"),
            "corpus": {"path": str(self.text["train"]), "validation_path": str(self.text["validation"])},
            "sequences": {"length": size["length"]},
            "teacher": {**base["teacher"], "model": str(self.teacher)},
            "store": {**store, **block, "path": str(self.directory / "stores" / slug(arm.store))},
            "student": {**base["student"], "layers": size["layers"], **arm.student},
            "train": {
                "batch_size": size["batch_size"], "micro_batch_size": size["batch_size"], **base["train"],
                **arm.train, "epochs": 1000.0, "max_steps": max(steps, 1), "seed": seed,
            },
        }  # fmt: skip
        path = self.directory / "recipes" / f"{name}.yaml"
        storage.publish_if_changed(str(path), yaml.safe_dump(sections, sort_keys=False).encode())
        return str(path)


def slug(name: str) -> str:
    """A name for files: ``replay 1, int8`` is ``replay-1-int8``."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def bytes_per_sample(store: dict[str, Any], length: int, teacher: Path) -> int:
    """Of this store; blocks of the same number of samples give every store the same order of samples."""
    config = json.loads((teacher / "config.json").read_text())
    return Layout(
        length=length,
        masked=masked_count(length, 0.15),
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        top_k=store["top_k"],
        temperatures=(1.0, 2.0) if store["top_k"] else (),
        hidden_states=store.get("hidden_states", "float16"),
        positions="all",
        replay_layers=store["replay_layers"],
        teacher_weights=True,
    ).bytes_per_sample()


def cut_text(sources: list[Path], target: Path, characters: int) -> None:
    """The first lines of every source, as many as hold its share of ``characters`` (plus one line)."""
    lines = []
    for path in sources:
        left = characters // len(sources)
        for line in path.read_text().splitlines():
            if left <= 0:
                break
            lines.append(line)
            left -= len(line) + 1
    storage.publish_if_changed(str(target), ("\n".join(lines) + "\n").encode())
