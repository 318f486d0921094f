"""Makes real stores without Ray and corpus: the worker of the pass reads random sequences."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BertForMaskedLM, BertTokenizer

from infra.settings.recipe import Recipe
from infra.settings.sections import Corpus, Masking, Sequences, Store, Teacher
from offline_teacher.cluster.task_work import TaskWorker
from offline_teacher.inputs.source import find_source, publish_files, spec_of
from offline_teacher.store.numbering import SplitPlan, Task
from offline_teacher.store.parts import publish_part
from offline_teacher.store.writer import begin_store, finish_store

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FACTS: dict[str, Any] = {
    "text": "xxh3-128:" + 32 * "0",
    "made_from": "xxh3-128:" + 32 * "0",
    "documents": 1,
    "text_bytes": 1,
    "problems": {"counts": {}, "examples": {}},
}


def save_teacher(model: BertForMaskedLM, directory: Path) -> Path:
    """Saves a model directory whose tokenizer has one invented word per id, and returns the directory."""
    size = model.config.vocab_size
    directory.mkdir(parents=True)
    words = directory / "vocab.txt"
    words.write_text("\n".join([*SPECIAL, *(f"word{number}" for number in range(len(SPECIAL), size))]))
    BertTokenizer(vocab=str(words)).save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Making:
    """An unfinished store, and the worker that makes its tasks."""

    recipe: Recipe
    worker: TaskWorker
    tasks: dict[str, list[Task]]

    @property
    def root(self) -> str:
        return self.recipe.store_path

    def run(self, split: str, in_flight: int) -> tuple[int, float]:
        """Makes all tasks of a split, ``in_flight`` at once; returns the tokens and the seconds. The seconds
        do not include a warm-up, in which the first batch of each thread is computed."""
        tasks = self.tasks[split]
        with ThreadPoolExecutor(in_flight) as threads:
            list(threads.map(lambda task: next(self._columns(split, task)), tasks[:in_flight]))
            begin = time.perf_counter()
            made = list(threads.map(lambda task: self.worker.infer(split, task), tasks))
        return sum(answer["tokens"] for answer in made), time.perf_counter() - begin

    def _columns(self, split: str, task: Task) -> Iterator[dict[str, np.ndarray]]:
        return self.worker.columns(split, task)

    def finish(self) -> str:
        """Makes all tasks and the manifest, and returns the store's directory."""
        for split in self.tasks:
            self.run(split, 1)
        finish_store(self.root, dict.fromkeys(self.tasks, 1))
        return self.root


def begin(
    directory: Path,
    teacher: Path,
    device: str,
    *,
    dtype: str,
    store: Store,
    length: int,
    sequences: dict[str, int],
    batch_size: int,
) -> Making:
    """Starts a store in ``directory`` with random full-length sequences. ``sequences``: split -> number of
    sequences."""
    recipe = Recipe(
        name="gpu",
        output=str(directory),
        corpus=Corpus(path=("random",)),
        sequences=Sequences(length=length),
        masking=Masking(probability=0.15),
        teacher=Teacher(model=str(teacher), dtype=dtype, batch_size=batch_size),  # type: ignore[arg-type]
        store=store,
    )
    source, recipe = find_source(recipe)
    spec = spec_of(recipe, source, {split: [] for split in sequences})
    begin_store(recipe.store_path, spec)
    publish_files(recipe.store_path, source, spec.layout)
    tasks = {}
    for number, (split, count) in enumerate(sequences.items()):
        columns = _sequences(spec.layout.vocab_size, length, count, spec.layout.id_dtype, seed=number)
        publish_part(recipe.store_path, spec.layout, split, 0, columns, FACTS)
        tasks[split] = list(SplitPlan.of(split, (count,), spec.plan).tasks())
    return Making(recipe, TaskWorker(recipe, device, recipe.store_path), tasks)


def _sequences(vocab_size: int, length: int, count: int, dtype: np.dtype, seed: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(len(SPECIAL), vocab_size, (count, length)).astype(dtype)
    ids[:, 0], ids[:, -1] = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    return {"input_ids": ids, "token_count": np.full(count, length, np.uint16)}
