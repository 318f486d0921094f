"""Data of a user's own tasks, in the words of the tiny encoder, and the task files of docs/tasks.md."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path

import yaml

from tests.conftest import ROOT
from tests.evaluation.conftest import BAD, FILLER, GOOD

QUEUES = {"praise": GOOD, "complaint": BAD, "question": ("who", "?")}

NUMBERS = {"epochs: 4": "epochs: 12", "2.0e-5": "1.0e-3", "5.0e-5": "3.0e-3"}


def doc_tasks() -> dict[str, str]:
    """Name -> the task file that docs/tasks.md shows."""
    blocks = re.findall(r"```yaml\n(name: .*?)```", (ROOT / "docs/tasks.md").read_text(), re.DOTALL)
    return {yaml.safe_load(block)["name"]: block for block in blocks}


def write_all(root: Path) -> dict[str, str]:
    """The three tasks of the documentation with their data; name -> path of the task file."""
    generator = random.Random(0)
    write_tickets(root / "tickets.csv", generator, 400)
    for part, count in (("train", 200), ("dev", 40), ("test", 40)):
        write_entities(root / "entities" / f"{part}.conll", generator, count)
    write_search(root / "search")
    paths = {}
    for name, text in doc_tasks().items():
        for documented, tiny in NUMBERS.items():  # a tiny model with random weights needs larger steps
            text = text.replace(documented, tiny)
        (root / f"{name}.yaml").write_text(text)
        paths[name] = str(root / f"{name}.yaml")
    return paths


def write_tickets(path: Path, generator: random.Random, count: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "queue"])
        for _ in range(count):
            queue = generator.choices(list(QUEUES), [5, 3, 2])[0]
            words = [*generator.choices(FILLER, k=3), generator.choice(QUEUES[queue])]
            writer.writerow([f'"{words[3]}", {" ".join(words)}', queue])


def write_entities(path: Path, generator: random.Random, count: int) -> None:
    """A car, alone or red, is a THING; a house is a PLACE."""
    path.parent.mkdir(parents=True, exist_ok=True)
    phrases = (
        ("car B-THING",),
        ("red B-THING", "car I-THING"),
        ("house B-PLACE",),
        ("day O",),
        ("is O", "very O"),
    )
    sentences = []
    for _ in range(count):
        chosen = generator.choices(phrases, k=4)
        sentences.append("\n".join(line for phrase in chosen for line in phrase))
    path.write_text("-DOCSTART- O\n\n" + "\n\n".join(sentences) + "\n")


def write_search(root: Path) -> None:
    (root / "qrels").mkdir(parents=True)
    texts = {"d1": "the red car", "d2": "a house", "d3": "dull grey cold day", "d4": "who ?"}
    documents = [{"_id": name, "title": "", "text": text} for name, text in texts.items()]
    queries = [{"_id": "q1", "text": "red car"}, {"_id": "q2", "text": "house"}, {"_id": "q3", "text": "day"}]
    (root / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n")
    (root / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)) + "\n")
    (root / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td2\t1\nq2\td1\t0\n")
