"""Ways to damage a store, and the commands that make it whole."""

from __future__ import annotations

import os
from pathlib import Path

from offline_teacher.main import main
from offline_teacher.store.store import Store
from tests.offline_teacher.local_pool import make

TASK = "e000-p00000-0001"


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def flip(path: Path, offset: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset is None else offset] ^= 16
    path.write_bytes(data)


def first_shard(store: Path) -> Path:
    return min((store / "shards/train" / TASK).glob("*.arrow"))


def again(made: Path, store: Path, *overrides: str) -> Store:
    """The pass, over the store."""
    return make(made, f"store.path={store}", *overrides)


def run_repair(made: Path, store: Path, *overrides: str) -> int:
    return main(["verify", str(store), "--repair", "--recipe", str(made), *overrides])


DAMAGE = {
    "a shard": lambda store: flip(first_shard(store)),
    "no shard": lambda store: first_shard(store).unlink(),
    "a shard cut off": lambda store: os.truncate(first_shard(store), 100),
    "an index": lambda store: flip(store / f"tasks/train/{TASK}.json"),
    "no index": lambda store: (store / f"tasks/train/{TASK}.json").unlink(),
    "a part": lambda store: flip(store / "sequences/train/part-00000.arrow"),
    "counts": lambda store: flip(store / "sequences/train/part-00000.counts.arrow"),
    "index of a part": lambda store: flip(store / "sequences/train/part-00000.json"),
    "no part": lambda store: (store / "sequences/validation/part-00000.json").unlink(),
    "manifest": lambda store: flip(store / "manifest.json"),
    "no manifest": lambda store: (store / "manifest.json").unlink(),
    "spec": lambda store: flip(store / "spec.json"),
    "no spec": lambda store: (store / "spec.json").unlink(),
    "weights": lambda store: flip(store / "teacher/model.safetensors", -3),
    "configuration": lambda store: flip(store / "teacher/config.json"),
    "no tokenizer": lambda store: (store / "tokenizer/tokenizer.json").unlink(),
    "a file more": lambda store: (store / "tokenizer/more.json").write_text("{}"),
    "a shard more": lambda store: (first_shard(store).parent / "x.arrow").write_text(""),
    "a part more": lambda store: (store / "sequences/train/notes.txt").write_text("mine"),
    "held-out shard": lambda store: flip(min((store / "shards/validation").rglob("*.arrow"))),
}
