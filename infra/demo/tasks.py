"""Five labelled tasks on the demo's language, in the layouts of the official GLUE files.

A training row has only words that ``Language.seen`` leaves, a dev row any: what most dev rows ask is known from
the running text or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from infra.demo.language import (
    SENTENCES,
    SLOTS,
    Language,
    about_kind,
    opinion,
    read_language,
    say,
    told_and_implied,
)  # fmt: skip

Row = list[str]


@dataclass(frozen=True)
class Task:
    """A task's header (None: CoLA has none), how a row is drawn, and the numbers of rows."""

    name: str
    header: Row | None
    draw: Callable[[Language, int, Random], Row]
    train: int
    dev: int


def sentiment(language: Language, index: int, rng: Random) -> Row:
    good = index % 2 == 0
    return [opinion(language, rng.choice(SENTENCES["opinion"]), good, rng), str(int(good))]


def acceptability(language: Language, index: int, rng: Random) -> Row:
    """Wrong: the ending of the verb, or a verb that things of this kind have nothing to do with."""
    kind = doer = rng.choice(language.kinds)
    acceptable = index % 2 == 0
    template = rng.choice(SENTENCES[rng.choice(["act", "handle" if kind.handle else "act"])])
    if not acceptable and rng.random() < 0.3:
        template = rng.choice(SENTENCES["disagreeing"])
    elif not acceptable:
        others = [
            other for other in language.kinds if other != kind and (other.handle or "handle" not in template)
        ]
        doer = rng.choice(others)
    text = about_kind(language, template, kind, doer, rng)
    return ["demo", str(int(acceptable)), "" if acceptable else "*", f"{text} ."]


def pair(language: Language, changes: int, rng: Random) -> tuple[str, str]:
    """Two tellings of events that differ in ``changes`` slots; what agrees is said by another synonym."""
    first = language.event(rng)
    second = language.changed(first, rng.sample(SLOTS, changes), rng)
    words = {slot: rng.sample(first[slot], 2) for slot in SLOTS}
    one = {slot: (words[slot][0],) for slot in SLOTS}
    two = {slot: (words[slot][1],) if second[slot] == first[slot] else second[slot] for slot in SLOTS}
    return tuple(f"{say(SENTENCES['event'], event, rng)} ." for event in (one, two))  # type: ignore[return-value]


def paraphrase(language: Language, index: int, rng: Random) -> Row:
    same = index % 2 == 0
    return [
        str(int(same)),
        str(2 * index),
        str(2 * index + 1),
        *pair(language, 0 if same else rng.choice((2, 3)), rng),
    ]


def similarity(language: Language, index: int, rng: Random) -> Row:
    """The score is the number of the five slots that mean the same."""
    agreeing = index % (len(SLOTS) + 1)
    texts = pair(language, len(SLOTS) - agreeing, rng)
    return [str(index), "demo", "demo", "2026", str(index), "none", "none", *texts, f"{agreeing:.3f}"]


def entailment(language: Language, index: int, rng: Random) -> Row:
    follows = index % 2 == 0
    texts = (f"{text} ." for text in told_and_implied(language, follows, rng))
    return [str(index), *texts, "entailment" if follows else "not_entailment"]


_STS_B = [
    "index",
    "genre",
    "filename",
    "year",
    "old_index",
    "source1",
    "source2",
    "sentence1",
    "sentence2",
    "score",
]
TASKS = (
    Task("CoLA", None, acceptability, 400, 1000),
    Task("SST-2", ["sentence", "label"], sentiment, 200, 1000),
    Task("MRPC", ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], paraphrase, 400, 1000),
    Task("STS-B", _STS_B, similarity, 400, 1000),
    Task("RTE", ["index", "sentence1", "sentence2", "label"], entailment, 400, 1000),
)


def task_files(task: Task, seed: int) -> dict[str, str]:
    """``{"train.tsv": text, "dev.tsv": text}``; a pure function of the seed, no row twice."""
    files: dict[str, str] = {}
    drawn: set[tuple[str, ...]] = set()
    whole = read_language()
    for part, language, count in (("train", whole.seen(), task.train), ("dev", whole, task.dev)):
        rng, rows = Random(f"{seed} {task.name} {part}"), []
        while len(rows) < count:
            row = task.draw(language, len(rows), rng)
            texts = tuple(field for field in row if " " in field)
            if texts not in drawn:
                drawn.add(texts)
                rows.append(row)
        lines = [*([task.header] if task.header else []), *rows]
        files[f"{part}.tsv"] = "".join("\t".join(line) + "\n" for line in lines)
    return files
