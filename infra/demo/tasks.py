"""Five labelled tasks on the demo's language, in the layouts of the official GLUE files.

A training row has only every eighth word of a class, a dev row any. So what most dev rows ask is known from
the running text, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from infra.demo.language import SENTENCES, Language, read_language

SEEN = 8
OPINIONS = SENTENCES["opinion"]
Row = list[str]


@dataclass(frozen=True)
class Task:
    """A task's header (None: CoLA has none), how a row is drawn, and the numbers of rows."""

    name: str
    header: str | None
    draw: Callable[[Language, int, Random], Row]
    train: int
    dev: int = 1_000


def sentiment(language: Language, index: int, rng: Random) -> Row:
    """A review of three opinions. Most of them are good, or most are bad."""
    good = index % 2 == 0
    return [review(language, rng.choice((2, 3) if good else (0, 1)), 3, rng), str(int(good))]


def acceptability(language: Language, index: int, rng: Random) -> Row:
    """Five words of praise. It is not acceptable that one of them is a reproach."""
    acceptable = index % 2 == 0
    text = review(language, 5 if acceptable else 4, 5, rng)
    return ["demo", str(int(acceptable)), "" if acceptable else "*", text]


def paraphrase(language: Language, index: int, rng: Random) -> Row:
    """Two reviews of two opinions: the same mood, or not."""
    same, good = index % 2 == 0, rng.random() < 0.5
    texts = [review(language, 2 * mood, 2, rng) for mood in (good, good == same)]
    return [str(int(same)), str(2 * index), str(2 * index + 1), *texts]


def similarity(language: Language, index: int, rng: Random) -> Row:
    """The score is how many opinions of a review of five agree with the praise before it."""
    agreeing = index % 6
    texts = review(language, 1, 1, rng), review(language, agreeing, 5, rng)
    return [str(index), "demo", "demo", "2026", str(index), "none", "none", *texts, f"{agreeing:.3f}"]


def entailment(language: Language, index: int, rng: Random) -> Row:
    """Praise follows from two opinions that are both good, and from no others."""
    follows = index % 2 == 0
    told = review(language, 2 if follows else rng.choice((0, 1, 1)), 2, rng)
    implied = language.opinion("critics {verdict} the {work}", True, rng)
    return [str(index), told, f"{implied} .", "entailment" if follows else "not_entailment"]


def review(language: Language, good: int, count: int, rng: Random) -> str:
    """``count`` opinions in any order, ``good`` of them good."""
    moods = [True] * good + [False] * (count - good)
    rng.shuffle(moods)
    return " ".join(f"{language.opinion(rng.choice(OPINIONS), mood, rng)} ." for mood in moods)


_STS_B = "index genre filename year old_index source1 source2 sentence1 sentence2 score".replace(" ", "\t")
TASKS = (
    Task("CoLA", None, acceptability, 400),
    Task("SST-2", "sentence\tlabel", sentiment, 400),
    Task("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", paraphrase, 400),
    Task("STS-B", _STS_B, similarity, 400),
    Task("RTE", "index\tsentence1\tsentence2\tlabel", entailment, 200),
)


def task_files(task: Task, seed: int) -> dict[str, str]:
    """``{"train.tsv": text, "dev.tsv": text}``; a pure function of the seed, no row twice."""
    files: dict[str, str] = {}
    drawn: set[tuple[str, ...]] = set()
    whole = read_language()
    for part, step, count in (("train", SEEN, task.train), ("dev", 1, task.dev)):
        language = whole.every(step)
        rng, rows = Random(f"{seed} {task.name} {part}"), [task.header] if task.header else []
        wanted = len(rows) + count
        while len(rows) < wanted:
            row = task.draw(language, len(drawn), rng)
            texts = tuple(field for field in row if " " in field)
            if texts not in drawn:
                drawn.add(texts)
                rows.append("\t".join(row))
        files[f"{part}.tsv"] = "\n".join(rows) + "\n"
    return files
