"""Five labelled tasks on the demo's language, in the layouts of the official GLUE files.

Training rows contain only one in eight words of a class; dev rows contain all of them. So a model can answer
most dev rows only if pre-training on the running text has taught it the other words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from infra.demo.language import WORDS, Author

SEEN = 8
Row = list[str]


@dataclass(frozen=True)
class Task:
    """A task's header line (CoLA has none), how row number n is drawn, and the numbers of rows."""

    name: str
    header: str
    draw: Callable[[Author, int], Row]
    train: int = 400
    dev: int = 1_000


def sentiment(author: Author, number: int) -> Row:
    """A review of three opinions. Most of them are good, or most are bad."""
    good = number % 2 == 0
    return [review(author, author.rng.choice((2, 3) if good else (0, 1)), 3), str(int(good))]


def acceptability(author: Author, number: int) -> Row:
    """Five words of praise; the row is not acceptable if one of them is a reproach."""
    acceptable = number % 2 == 0
    text = review(author, 5 if acceptable else 4, 5)
    return ["demo", str(int(acceptable)), "" if acceptable else "*", text]


def paraphrase(author: Author, number: int) -> Row:
    """Two reviews of two opinions: the same mood, or not."""
    same, good = number % 2 == 0, author.rng.random() < 0.5
    texts = [review(author, 2 * mood, 2) for mood in (good, good == same)]
    return [str(int(same)), str(2 * number), str(2 * number + 1), *texts]


def similarity(author: Author, number: int) -> Row:
    """The score is how many opinions of a review of five agree with the praise before it."""
    agreeing = number % 6
    texts = review(author, 1, 1), review(author, agreeing, 5)
    return [str(number), "demo", "demo", "2026", str(number), "none", "none", *texts, f"{agreeing:.3f}"]


def entailment(author: Author, number: int) -> Row:
    """Praise follows from two opinions that are both good, and from no others."""
    follows = number % 2 == 0
    told = review(author, 2 if follows else author.rng.choice((0, 1, 1)), 2)
    implied = author.say("critics {applause} the {work}")
    return [str(number), told, implied, "entailment" if follows else "not_entailment"]


def review(author: Author, good: int, count: int) -> str:
    """``count`` opinions in any order, ``good`` of them good."""
    moods = [True] * good + [False] * (count - good)
    author.rng.shuffle(moods)
    return " ".join(author.judge(mood) for mood in moods)


_STS_B = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
TASKS = (
    Task("CoLA", "", acceptability),
    Task("SST-2", "sentence\tlabel\n", sentiment),
    Task("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", paraphrase),
    Task("STS-B", _STS_B.replace(" ", "\t") + "\n", similarity),
    Task("RTE", "index\tsentence1\tsentence2\tlabel\n", entailment, train=200),
)


def task_files(task: Task, seed: int) -> dict[str, str]:
    """``{"train.tsv": text, "dev.tsv": text}``; a pure function of the seed, no row twice."""
    lines: dict[tuple[str, ...], str] = {}  # by their texts
    files = {}
    for part, step, count in (("train", SEEN, task.train), ("dev", 1, task.dev)):
        words = {name: every[::step] for name, every in WORDS.items()}
        author, before = Author(words, Random(f"{seed} {task.name} {part}"), skew=1.0), len(lines)
        while len(lines) < before + count:
            row = task.draw(author, len(lines))
            lines.setdefault(tuple(field for field in row if " " in field), "\t".join(row) + "\n")
        files[f"{part}.tsv"] = task.header + "".join(list(lines.values())[before:])
    return files
