"""Students of a sentence encoder, distilled from its stored vectors: how well they rank pairs they never saw.

    python -m tests.benchmarks.embedding_students --directory DIR [--sentences 60000] [--data ../shared]

One pooled store of sentences (Wikipedia, novels, questions of SQuAD, reviews of SST-2) teaches two students:
3 layers of 384, and 3 of 192 with a projection into the teacher's space. Each is scored on the whole dev set
of STS-B without fine-tuning: Spearman's correlation of the cosine of two vectors with people's scores. Beside
them stand the teacher and each student as it began.

No sentence of STS-B is learnt from, of any of its sets, and none of MRPC, out of which STS-B took pairs; what
another source has word for word in common with the dev set is left out. Given again, the command goes on
where it stopped. The result is ``DIR/embedding_students.json``.
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
from offline_teacher.store.reader import Store, open_store
from student_train.engine.world import World
from student_train.main import model_and_objective
from student_train.student.sentence_files import write_sentence_files

ROOT = Path(__file__).resolve().parents[2]
LENGTH, BATCH, HELD_OUT = 32, 64, 500
LOSS = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0, "alpha_embedding": 1.0}
STUDENTS: dict[str, dict[str, Any]] = {
    "half": {"student": {"layers": [0, 2, 5]}},
    "narrow": {"student": {"layers": [0, 2, 5], "hidden_size": 192}},
}
SHARES = {"wikipedia": 0.45, "novels": 0.2, "squad": 0.2, "sst2": 0.15}
"""Of the sentences learnt from."""
GOAL = 0.9
"""Of the teacher's correlation."""


def main() -> int:
    """Exit code 1 where a student misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared", help="has embedder/, data/")
    parser.add_argument("--directory", type=Path, required=True, help="where all is made, and gone on with")
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
        scores[f"{name}, undistilled"] = score(str(start), dev)
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
    """The text, if it is not there yet, and the recipe; the recipe's path."""
    directory.mkdir(parents=True, exist_ok=True)
    train = directory / "train.txt"
    if not train.exists():
        chosen = choose(data / "data", sentences)
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


def choose(data: Path, count: int) -> list[str]:
    """``count`` different sentences and the held-out ones, shuffled, without those of STS-B's dev set."""
    seen = {plain(text) for pair in pairs(data / "glue" / "STS-B" / "dev.tsv")[0] for text in pair}
    dice, chosen = random.Random(0), []
    for source, share in SHARES.items():
        wanted = round(share * (count + HELD_OUT))
        for sentence in SOURCES[source](data):
            key = plain(sentence)
            if key not in seen:
                seen.add(key)
                chosen.append(sentence)
                wanted -= 1
            if not wanted:
                break
    dice.shuffle(chosen)
    return chosen


def plain(text: str) -> str:
    """Lower-case letters and digits: what makes two sentences the same."""
    return "".join(re.findall(r"[a-z0-9]+", text.lower()))


def sentences(text: str) -> Iterator[str]:
    """Those of 4 to 28 words."""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        if 4 <= len(sentence.split()) <= 28:
            yield sentence.strip()


def of_wikipedia(data: Path) -> Iterator[str]:
    """Two of every paragraph."""
    for path in sorted((data / "wikipedia" / "train").glob("*.gz")):
        with gzip.open(path, "rt") as file:
            for paragraph in file:
                yield from list(sentences(paragraph))[:2]


def of_novels(data: Path) -> Iterator[str]:
    """From every novel in turn, one of every third paragraph."""
    texts = [path.read_text().splitlines() for path in sorted((data / "corpus" / "train").glob("*.txt"))]
    for number in range(0, max(map(len, texts)), 3):
        for lines in texts:
            if number < len(lines):
                yield from list(sentences(lines[number]))[:1]


def of_squad(data: Path) -> Iterator[str]:
    """Questions of every article in turn."""
    articles = json.loads((data / "squad_full" / "train-v1.1.json").read_text())["data"]
    asked = [[q["question"] for p in article["paragraphs"] for q in p["qas"]] for article in articles]
    for number in range(max(map(len, asked))):
        for questions in asked:
            if number < len(questions):
                yield from sentences(questions[number])


def of_sst2(data: Path) -> Iterator[str]:
    for line in (data / "glue" / "SST-2" / "train.tsv").read_text().splitlines()[1:]:
        yield from sentences(line.rpartition("\t")[0])


SOURCES = {"wikipedia": of_wikipedia, "novels": of_novels, "squad": of_squad, "sst2": of_sst2}


# --- the scores ---------------------------------------------------------------------------------------------


def pairs(path: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """The pairs of sentences of a set of STS-B, and people's scores [n]."""
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    return [(row[7], row[8]) for row in rows], np.array([float(row[9]) for row in rows])


def score(directory: str, dev: Path) -> float:
    """Spearman's correlation of cosines and people's scores over all pairs."""
    told, expected = pairs(dev)
    first, second = (encode(directory, list(texts)) for texts in zip(*told, strict=True))
    return spearman(functional.cosine_similarity(first, second).numpy(), expected)


@torch.no_grad()
def encode(directory: str, texts: list[str]) -> Tensor:
    """Vectors [n, D], as sentence-transformers makes them of the modules of a directory."""
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
    """How a directory pools; of a student with a projection, what comes before it."""
    import tempfile

    modules = json.loads(Path(directory, "modules.json").read_text())
    kept = [module for module in modules if not module["type"].endswith(("Dense", "Normalize"))]
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "modules.json").write_text(json.dumps(kept))
        Path(scratch, "1_Pooling").symlink_to(Path(directory, "1_Pooling").resolve())
        return read_pooling(scratch)


def save_start(run: StudentRun, store: Store, directory: Path) -> None:
    """The student as its training finds it, in the form in which it is published."""
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
