"""Measures students of a sentence encoder that are distilled from its stored embeddings.

    python -m tests.benchmarks.embedding_students --directory DIR [--sentences 60000] [--data ../shared]

Two students are trained on one pooled store of sentences (Wikipedia, novels, questions of SQuAD, reviews of
SST-2): one has 3 layers and hidden size 384, the other 3 layers, hidden size 192 and a projection to the
teacher's hidden size. The score is Spearman's correlation of cosine similarity and human scores on the dev
set of STS-B, without fine-tuning. The teacher and each student before its training are scored too.

No sentence of STS-B, or of MRPC, from which STS-B has pairs, is used for training. A sentence of another
source that also occurs in the dev set is left out. The command continues where it was stopped. The result is
``DIR/embedding_students.json``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn import functional

from evaluation.measures.metrics import spearman
from infra.console import table
from infra.files import storage
from infra.settings.recipe import StudentRun
from infra.settings.recipe_file import load_recipe
from offline_teacher.models.pooling import pool, read_pooling
from offline_teacher.store.store import Store, open_store
from student_train.engine.world import World
from student_train.student.sentence_files import write_sentence_files
from student_train.student_and_loss import model_and_objective

ROOT = Path(__file__).resolve().parents[2]
LENGTH, BATCH, HELD_OUT = 32, 64, 500
LOSS = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0, "alpha_embedding": 1.0}
STUDENTS: dict[str, dict[str, Any]] = {
    "half": {"student": {"layers": [0, 2, 5]}},
    "narrow": {"student": {"layers": [0, 2, 5], "hidden_size": 192}},
}
SHARES = {"wikipedia": 0.45, "novels": 0.2, "squad": 0.2, "sst2": 0.15}
"""Source -> share of the training sentences."""
GOAL = 0.9
"""Smallest correlation of a student, as a share of the teacher's."""


def main() -> int:
    """Returns exit code 1 if a student misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared", help="has embedder/, data/")
    parser.add_argument("--directory", type=Path, required=True, help="directory of all outputs")
    parser.add_argument("--sentences", type=int, default=60_000)
    options = parser.parse_args()
    recipe_path = write_recipe(options.directory, options.data, options.sentences)
    command("-m", "offline_teacher.main", "run", "--recipe", str(recipe_path))
    recipe = load_recipe(str(recipe_path))
    dev = options.data / "data" / "glue" / "STS-B" / "dev.tsv"
    teacher = str(options.data / "embedder")
    scores = {"teacher": score(teacher, dev)}
    for name, run in recipe.runs().items():
        start = options.directory / f"start-{name}"
        save_start(run, open_store(recipe.store_path), start)
        scores[f"{name}, start"] = score(str(start), dev)
        command("student_train/main.py", "--recipe", str(recipe_path), "--student", name)
        scores[name] = score(f"{run.directory}/model", dev)
        storage.publish_json(str(options.directory / "embedding_students.json"), scores)
    rows = [(name, f"{value:.4f}", f"{value / scores['teacher']:.1%}") for name, value in scores.items()]
    print(table(rows, ["model", "Spearman on STS-B dev", "of the teacher's"]))
    return 0 if all(scores[name] >= GOAL * scores["teacher"] for name in STUDENTS) else 1


def command(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


# --- the text -----------------------------------------------------------------------------------------------


def write_recipe(directory: Path, data: Path, sentences: int) -> Path:
    """Writes the text, if it does not exist, and the recipe. Returns the path of the recipe."""
    directory.mkdir(parents=True, exist_ok=True)
    train = directory / "train.txt"
    if not train.exists():
        chosen = choose_sentences(data / "data", sentences)
        (directory / "validation.txt").write_text("\n".join(chosen[:HELD_OUT]) + "\n")
        storage.publish_bytes(str(train), ("\n".join(chosen[HELD_OUT:]) + "\n").encode())
    sections = {
        "name": "embedding",
        "output": str(directory / "runs"),
        "corpus": {"path": str(train), "validation_path": str(directory / "validation.txt")},
        "sequences": {"length": LENGTH, "packing": "document"},
        "teacher": {"model": str(data / "embedder"), "dtype": "bfloat16", "workers": 1},
        "store": {"positions": "pooled", "top_k": 0, "hidden_states": "none"},
        "student": {"dropout": 0.0},
        "train": {
            **LOSS, "epochs": 0.75, "batch_size": BATCH, "micro_batch_size": BATCH, "learning_rate": 5e-4,
            "log_every": 50, "checkpoint_minutes": 2.0,
        },
        "students": STUDENTS,
        "tracking": {"enabled": False},
    }  # fmt: skip
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def choose_sentences(data: Path, count: int) -> list[str]:
    """Returns ``count`` + HELD_OUT different sentences, shuffled, without those of STS-B's dev set."""
    seen = {normalised(text) for pair in pairs(data / "glue" / "STS-B" / "dev.tsv")[0] for text in pair}
    rng, chosen = random.Random(0), []
    for source, share in SHARES.items():
        remaining = round(share * (count + HELD_OUT))
        for sentence in SOURCES[source](data):
            key = normalised(sentence)
            if key not in seen:
                seen.add(key)
                chosen.append(sentence)
                remaining -= 1
            if not remaining:
                break
    rng.shuffle(chosen)
    return chosen


def normalised(text: str) -> str:
    """Returns the lower-case letters and digits of a sentence; equal sentences have equal ones."""
    return "".join(re.findall(r"[a-z0-9]+", text.lower()))


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences with 4 to 28 words."""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        if 4 <= len(sentence.split()) <= 28:
            yield sentence.strip()


def of_wikipedia(data: Path) -> Iterator[str]:
    """Yields up to two sentences of every paragraph."""
    for path in sorted((data / "wikipedia" / "train").glob("*.gz")):
        with gzip.open(path, "rt") as file:
            for paragraph in file:
                yield from list(sentences(paragraph))[:2]


def of_novels(data: Path) -> Iterator[str]:
    """Yields one sentence of every third paragraph, from the novels in turn."""
    texts = [path.read_text().splitlines() for path in sorted((data / "corpus" / "train").glob("*.txt"))]
    for number in range(0, max(map(len, texts)), 3):
        for lines in texts:
            if number < len(lines):
                yield from list(sentences(lines[number]))[:1]


def of_squad(data: Path) -> Iterator[str]:
    """Yields questions, from the articles in turn."""
    articles = json.loads((data / "squad_full" / "train-v1.1.json").read_text())["data"]
    by_article = [[q["question"] for p in article["paragraphs"] for q in p["qas"]] for article in articles]
    for number in range(max(map(len, by_article))):
        for questions in by_article:
            if number < len(questions):
                yield from sentences(questions[number])


def of_sst2(data: Path) -> Iterator[str]:
    for line in (data / "glue" / "SST-2" / "train.tsv").read_text().splitlines()[1:]:
        yield from sentences(line.rpartition("\t")[0])


SOURCES = {"wikipedia": of_wikipedia, "novels": of_novels, "squad": of_squad, "sst2": of_sst2}


# --- the scores ---------------------------------------------------------------------------------------------


def pairs(path: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Returns the pairs of sentences in a file of STS-B, and their human scores [n]."""
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    return [(row[7], row[8]) for row in rows], np.array([float(row[9]) for row in rows])


def score(directory: str, dev: Path) -> float:
    """Returns Spearman's correlation of cosine similarity and human scores over all pairs."""
    text_pairs, human_scores = pairs(dev)
    first, second = (encode(directory, list(texts)) for texts in zip(*text_pairs, strict=True))
    return spearman(functional.cosine_similarity(first, second).numpy(), human_scores)


@torch.no_grad()
def encode(directory: str, texts: list[str]) -> Tensor:
    """Returns embeddings [n, D], computed as sentence-transformers does with the modules of a directory."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, parts = AutoModel.from_pretrained(directory, dtype=torch.float32).eval(), []
    dense = Path(directory, "2_Dense", "model.safetensors")
    weight = load_file(dense)["linear.weight"] if dense.exists() else None
    pooling = pooling_of(directory)
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        vectors = pool(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask.sum(1), pooling)
        parts.append(vectors if weight is None else vectors @ weight.T)
    return torch.cat(parts)


def pooling_of(directory: str) -> Any:
    """Returns the pooling of a model directory; modules after the pooling, such as a projection, are
    ignored."""
    import tempfile

    modules = json.loads(Path(directory, "modules.json").read_text())
    kept = [module for module in modules if not module["type"].endswith(("Dense", "Normalize"))]
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "modules.json").write_text(json.dumps(kept))
        Path(scratch, "1_Pooling").symlink_to(Path(directory, "1_Pooling").resolve())
        return read_pooling(scratch)


def save_start(run: StudentRun, store: Store, directory: Path) -> None:
    """Saves the student before its training as a model directory for sentence-transformers."""
    model, _ = model_and_objective(run, store, World(0, 1, torch.device("cpu")))
    directory.mkdir(exist_ok=True)
    model.save(str(directory))
    assert model.pooling is not None
    width = model.model.config.hidden_size
    write_sentence_files(str(directory), model.pooling, model.projection, width, LENGTH)
    for name, data in store.tokenizer_files().items():
        (directory / name).write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
