"""Five labelled tasks on the demo's language, in the layouts of the official GLUE files.

A training row has only every eighth word of a class, a dev row any. So what most dev rows ask is known from
the running text, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from infra.demo.language import SENTENCES, SLOTS, Language, about_kind, opinion, read_language, say
from infra.demo.language import told_and_implied as statements

SEEN = 8
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
    """Wrong: the ending of the verb, or a verb that things of this kind have nothing to do with."""
    kind = doer = rng.choice(list(language.kinds))
    acceptable = index % 2 == 0
    verb = rng.choice(["act", "handle" if language.kinds[kind]["handle"] else "act"])
    if not acceptable and rng.random() < 0.3:
        verb = "disagreeing"
    elif not acceptable:
        doer = rng.choice([name for name, other in language.kinds.items() if name != kind and other[verb]])
    text = about_kind(language, rng.choice(SENTENCES[verb]), kind, doer, rng)
    return ["demo", str(int(acceptable)), "" if acceptable else "*", f"{text} ."]


def pair(language: Language, changes: int, rng: Random) -> Row:
    """Two tellings of events that differ in ``changes`` slots; what agrees is said by another synonym."""
    first = language.event(rng)
    second = language.changed(first, rng.sample(SLOTS, changes), rng)
    said = {slot: rng.sample(words, len(words)) for slot, words in first.items()}
    again = {slot: said[slot][1:] if second[slot] == first[slot] else second[slot] for slot in SLOTS}
    once = {slot: words[:1] for slot, words in said.items()}
    return [f"{say(SENTENCES['event'], event, rng)} ." for event in (once, again)]


def paraphrase(language: Language, index: int, rng: Random) -> Row:
    same = index % 5 < 3  # GLUE has more paraphrases than others too
    texts = pair(language, 0 if same else rng.choice((2, 3)), rng)
    return [str(int(same)), str(2 * index), str(2 * index + 1), *texts]


def similarity(language: Language, index: int, rng: Random) -> Row:
    """The score is the number of the five slots that mean the same."""
    agreeing = index % (len(SLOTS) + 1)
    texts = pair(language, len(SLOTS) - agreeing, rng)
    return [str(index), "demo", "demo", "2026", str(index), "none", "none", *texts, f"{agreeing:.3f}"]


def entailment(language: Language, index: int, rng: Random) -> Row:
    follows = index % 2 == 0
    texts = (f"{text} ." for text in statements(language, follows, rng))
    return [str(index), *texts, "entailment" if follows else "not_entailment"]


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
