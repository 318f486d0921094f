"""Five labelled tasks on the demo's language, in the layouts of the official GLUE files.

A training row has only every eighth word of a class, a dev row any. So what most dev rows ask is known from
the running text, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from infra.demo.language import SENTENCES, Language, about_kind, fill, opinion, read_language, say

SEEN = 8
JUDGEMENT = "the {work} is {tone} and {tone} and has {tone} {aspect} and {tone} {aspect} and {tone} {aspect}"
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
    good = index % 2 == 0
    return [opinion(language, rng.choice(SENTENCES["opinion"]), good, rng), str(int(good))]


def acceptability(language: Language, index: int, rng: Random) -> Row:
    """Three things do what beasts do. Wrong: one of them is no beast."""
    acceptable = index % 2 == 0
    kinds = ["beast", "beast", "beast" if acceptable else other_kind(language, "beast", rng)]
    rng.shuffle(kinds)
    texts = [about_kind(language, SENTENCES["act"][0], kind, "beast", rng) for kind in kinds]
    return ["demo", str(int(acceptable)), "" if acceptable else "*", f"{' and '.join(texts)} ."]


def paraphrase(language: Language, index: int, rng: Random) -> Row:
    """Two opinions on one work: the same, or not."""
    same, good = index % 2 == 0, rng.random() < 0.5
    texts = [f"{opinion(language, rng.choice(SENTENCES['opinion'][:2]), mood, rng)} ." for mood in (good, good == same)]
    return [str(int(same)), str(2 * index), str(2 * index + 1), *texts]


def similarity(language: Language, index: int, rng: Random) -> Row:
    """The score is how many of the five words of a judgement agree with the praise before it."""
    agreeing = index % 6
    texts = praise_and_judgement(language, agreeing, rng)
    return [str(index), "demo", "demo", "2026", str(index), "none", "none", *texts, f"{agreeing:.3f}"]


def entailment(language: Language, index: int, rng: Random) -> Row:
    """Somebody gets five things. It follows that most are instruments, or it does not."""
    follows = index % 2 == 0
    count = rng.choice((3, 4, 5) if follows else (0, 1, 2))
    kinds = ["instrument"] * count + [other_kind(language, "instrument", rng) for _ in range(5 - count)]
    rng.shuffle(kinds)
    event = language.event(rng)
    things = " and ".join(f"the {rng.choice(language.kinds[kind]['words'])}" for kind in kinds)
    told = say("the {person} {deed}s ", event, rng) + things
    implied = say("the {person} {deed}s instruments", event, rng)
    return [str(index), f"{told} .", f"{implied} .", "entailment" if follows else "not_entailment"]


def other_kind(language: Language, kind: str, rng: Random) -> str:
    return rng.choice([name for name in language.kinds if name != kind])


def praise_and_judgement(language: Language, agreeing: int, rng: Random) -> list[str]:
    """A sentence of praise, and one of five judging words of which ``agreeing`` are good."""
    tones = [rng.choice(language.opinion["good" if place < agreeing else "bad"]) for place in range(5)]
    rng.shuffle(tones)
    words = iter(tones)
    praise = opinion(language, rng.choice(SENTENCES["opinion"]), True, rng)
    judgement = fill(JUDGEMENT, lambda name: next(words) if name == "tone" else rng.choice(language.opinion[name]))
    return [f"{praise} .", f"{judgement} ."]


_STS_B = "index genre filename year old_index source1 source2 sentence1 sentence2 score".replace(" ", "\t")
TASKS = (
    Task("CoLA", None, acceptability, 400),
    Task("SST-2", "sentence\tlabel", sentiment, 200),
    Task("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", paraphrase, 400),
    Task("STS-B", _STS_B, similarity, 400),
    Task("RTE", "index\tsentence1\tsentence2\tlabel", entailment, 400),
)


def task_files(task: Task, seed: int) -> dict[str, str]:
    """``{"train.tsv": text, "dev.tsv": text}``; a pure function of the seed, no row twice."""
    files: dict[str, str] = {}
    drawn: set[tuple[str, ...]] = set()
    whole = read_language()
    for part, language, count in (("train", whole.every(SEEN), task.train), ("dev", whole, task.dev)):
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
