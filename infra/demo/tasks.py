"""Five labelled tasks on the demo language, in the layouts of the official GLUE files.

What a dev row asks is never in the train rows alone: half of the tone-bearing words of SST-2 and many
concepts of the pair tasks occur only in dev, so a model has to know them from the running text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from infra.demo.documents import changed, contradicted, entailed
from infra.demo.grammar import Clause, Speaker, say, sentence
from infra.demo.lexicon import TIMES, build_lexicon
from infra.demo.morphology import past

Row = list[str]


@dataclass(frozen=True)
class Task:
    """A task's files: its header (None: CoLA has none), one row drawn at a time, and the sizes."""

    name: str
    header: Row | None
    draw: Callable[[Speaker, int, bool], Row]
    train: int
    dev: int


def sentiment_row(speaker: Speaker, index: int, train: bool) -> Row:
    """Half of the tone-bearing words, and their denials, are seen only in dev."""
    lexicon = speaker.lexicon
    good = speaker.rng.random() < 0.5
    if train:
        lexicon = replace(lexicon, positive=lexicon.positive[::2], negative=lexicon.negative[::2])
    narrowed = Speaker(lexicon, speaker.rng)
    tone = lexicon.positive if good else lexicon.negative
    words = narrowed.opinion(speaker.rng.choice(lexicon.works), good, tone, negate=0.2)
    return [" ".join(words), str(int(good))]


def grammar_row(speaker: Speaker, index: int, train: bool) -> Row:
    rng = speaker.rng
    clause = speaker.event(adjuncts=0.5)
    if rng.random() < 0.5:
        clause = replace(clause, subject=speaker.with_relative(clause.subject))
    acceptable = rng.random() < 0.6
    words = say(clause, rng, vary=False) if acceptable else spoiled(clause, speaker)
    return ["demo", str(int(acceptable)), "" if acceptable else "*", sentence(words)]


def spoiled(clause: Clause, speaker: Speaker) -> list[str]:
    """The clause said with one violation: agreement, tense, word order, or verb form."""
    rng = speaker.rng
    kind = rng.choice(("agreement", "tense", "order", "form"))
    if kind == "agreement":
        present = replace(clause, tense="present", time=None, negated=False)
        return say(present, rng, vary=False, wrong_agreement=True)
    if kind == "tense":
        other = rng.choice([tense for tense in ("past", "future") if tense != clause.tense])
        tense = clause.tense if clause.tense != "present" else ("future" if other == "past" else "past")
        return say(replace(clause, tense=tense, time=rng.choice(TIMES[other])), rng, vary=False)
    if kind == "form":
        wrong = replace(clause, negated=False, tense="future", subject=replace(clause.subject, relative=None))
        words = say(wrong, rng, vary=False)
        place = words.index("will") + 1
        words[place] = past(words[place])
        return words
    words = say(clause, rng, vary=False)
    return moved(words, rng)


def moved(words: list[str], rng: Random) -> list[str]:
    """Two neighbours change places where that breaks a phrase (``the dog`` -> ``dog the``)."""
    spots = [
        i for i, word in enumerate(words[:-1]) if word in ("the", "a", "an", "in", "that", "will", "not")
    ]
    if not spots:
        return [words[1], words[0], *words[2:]]
    at = rng.choice(spots)
    return [*words[:at], words[at + 1], words[at], *words[at + 2 :]]


def full_event(speaker: Speaker) -> Clause:
    """An event in which every slot is filled, so that any of them can be changed."""
    clause = speaker.event(adjuncts=1.0)
    plain = replace(clause.subject, adjective=None)
    return replace(clause, subject=plain, negated=False)


def paraphrase_row(speaker: Speaker, index: int, train: bool) -> Row:
    rng = speaker.rng
    clause = replace(full_event(speaker), time=None)
    same = rng.random() < 0.5
    first = say(clause, rng)
    other = clause
    for slot in () if same else rng.sample(("subject", "verb", "object", "place"), 2):
        other = changed(other, speaker, slot)
    second = say(other, rng)
    while second == first:
        second = say(other, rng)
    return [str(int(same)), str(2 * index), str(2 * index + 1), sentence(first), sentence(second)]


def similarity_row(speaker: Speaker, index: int, train: bool) -> Row:
    """Score = 5 minus the number of the five slots that were changed."""
    rng = speaker.rng
    clause = full_event(speaker)
    changes = rng.randint(0, 5)
    other = clause
    for slot in rng.sample(("subject", "verb", "object", "place", "time"), changes):
        other = changed(other, speaker, slot)
    first, second = sentence(say(clause, rng)), sentence(say(other, rng))
    source = ["none", "none"]
    return [str(index), "demo", "demo", "2026", str(index), *source, first, second, f"{5 - changes:.3f}"]


def entailment_row(speaker: Speaker, index: int, train: bool) -> Row:
    rng = speaker.rng
    clause = speaker.event(adjuncts=0.7)
    follows = rng.random() < 0.5
    hypothesis = entailed(clause, speaker) if follows else contradicted(clause, speaker)
    label = "entailment" if follows else "not_entailment"
    return [str(index), sentence(say(clause, rng)), sentence(say(hypothesis, rng)), label]


STS_HEADER = ["index", "genre", "filename", "year", "old_index", "source1", "source2"]
STS_HEADER += ["sentence1", "sentence2", "score"]

TASKS = (
    Task("SST-2", ["sentence", "label"], sentiment_row, 1200, 500),
    Task("CoLA", None, grammar_row, 3000, 500),
    Task("MRPC", ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], paraphrase_row, 3000, 500),
    Task("STS-B", STS_HEADER, similarity_row, 3000, 500),
    Task("RTE", ["index", "sentence1", "sentence2", "label"], entailment_row, 3000, 500),
)


def task_files(task: Task, seed: int) -> dict[str, str]:
    """``{"train.tsv": text, "dev.tsv": text}``; a pure function of the seed, no row in both."""
    files: dict[str, str] = {}
    seen: set[tuple[str, ...]] = set()
    for split, count in (("train", task.train), ("dev", task.dev)):
        speaker = Speaker(build_lexicon(), Random(f"{seed} {task.name} {split}"))
        rows: list[Row] = []
        while len(rows) < count:
            speaker.change_topic()
            row = task.draw(speaker, len(rows), split == "train")
            content = tuple(field for field in row if " " in field)
            if content not in seen:
                seen.add(content)
                rows.append(row)
        lines = ["\t".join(row) for row in ([task.header] if task.header else []) + rows]
        files[f"{split}.tsv"] = "\n".join(lines) + "\n"
    return files
