"""Five labelled tasks in the demo's language, in the layouts of the official GLUE files.

Training rows contain only one in eight words of a class; dev rows contain all words. So a model can answer
most dev rows only if it has learned the other words from the corpus in pre-training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from infra.demo.language import WORDS, Author

TRAIN_STEP = 8
"""Training rows use every eighth word of a class."""
Row = list[str]


@dataclass(frozen=True)
class Task:
    """A task of the demo, with its numbers of training and dev rows."""

    name: str
    header: str
    """Header line of its files; empty for CoLA."""
    draw: Callable[[Author, int], Row]
    """Draws the row with the given number."""
    train: int = 400
    dev: int = 1_000


def sentiment(author: Author, number: int) -> Row:
    """Draws a review of three opinions; the label says whether most of them are good."""
    good = number % 2 == 0
    return [review(author, author.rng.choice((2, 3) if good else (0, 1)), 3), str(int(good))]


def acceptability(author: Author, number: int) -> Row:
    """Draws a review of five opinions, acceptable if all of them are good; otherwise one is bad."""
    acceptable = number % 2 == 0
    text = review(author, 5 if acceptable else 4, 5)
    return ["demo", str(int(acceptable)), "" if acceptable else "*", text]


def paraphrase(author: Author, number: int) -> Row:
    """Draws two reviews of two opinions each; the label says whether both have the same mood."""
    same, good = number % 2 == 0, author.rng.random() < 0.5
    texts = [review(author, 2 * mood, 2) for mood in (good, good == same)]
    return [str(int(same)), str(2 * number), str(2 * number + 1), *texts]


def similarity(author: Author, number: int) -> Row:
    """Draws praise and a review of five opinions; the score is the number of good opinions in the review."""
    agreeing = number % 6
    texts = review(author, 1, 1), review(author, agreeing, 5)
    return [str(number), "demo", "demo", "2026", str(number), "none", "none", *texts, f"{agreeing:.3f}"]


def entailment(author: Author, number: int) -> Row:
    """Draws two opinions and a sentence of praise, which they entail only if both are good."""
    follows = number % 2 == 0
    premise = review(author, 2 if follows else author.rng.choice((0, 1, 1)), 2)
    hypothesis = author.fill("critics {applause} the {work}")
    return [str(number), premise, hypothesis, "entailment" if follows else "not_entailment"]


def review(author: Author, good: int, count: int) -> str:
    """Returns ``count`` opinions in random order, of which ``good`` are good."""
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
    """Returns ``{"train.tsv": text, "dev.tsv": text}``, in which no row occurs twice.

    Equal seeds give equal files.
    """
    lines: dict[tuple[str, ...], str] = {}  # texts of a row -> its line
    files = {}
    for split, step, count in (("train", TRAIN_STEP, task.train), ("dev", 1, task.dev)):
        words = {name: class_words[::step] for name, class_words in WORDS.items()}
        author, first = Author(words, Random(f"{seed} {task.name} {split}"), skew=1.0), len(lines)
        while len(lines) < first + count:
            row = task.draw(author, len(lines))
            lines.setdefault(tuple(field for field in row if " " in field), "\t".join(row) + "\n")
        files[f"{split}.tsv"] = task.header + "".join(list(lines.values())[first:])
    return files
