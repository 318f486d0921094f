"""The demo's language: words and sentences from ``language.yaml``, and the running text made of them.

A document tells an event twice and says how far the two agree, infers something, says what things are and
do, or judges a work. All that the labelled tasks ask can be learned from the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("language.yaml").read_text(encoding="utf-8"))
SENTENCES: dict[str, Any] = DATA["sentences"]
SLOTS: tuple[str, ...] = tuple(DATA["synonyms"])
SEEN = 8
"""Every eighth word or pair of synonyms may stand in the rows that a task is trained on."""

Concept = tuple[str, ...]
"""Words that mean the same."""
Event = dict[str, Concept]
"""What stands in each slot of a sentence."""


@dataclass(frozen=True)
class Kind:
    """Things of one kind: their words, what they do, and what people do to nothing else."""

    name: str
    words: Sequence[str]
    act: Sequence[str]
    handle: Sequence[str]


@dataclass(frozen=True)
class Language:
    synonyms: dict[str, Sequence[Concept]]
    kinds: Sequence[Kind]
    opinion: dict[str, Sequence[str]]

    def seen(self) -> Language:
        """With the words only that may stand in the rows a task is trained on."""
        return Language(
            {slot: concepts[::SEEN] for slot, concepts in self.synonyms.items()},
            [replace(kind, words=kind.words[::SEEN]) for kind in self.kinds],
            {name: words[::SEEN] for name, words in self.opinion.items()},
        )

    def event(self, rng: Random) -> Event:
        return {slot: rng.choice(concepts) for slot, concepts in self.synonyms.items()}

    def changed(self, event: Event, slots: Sequence[str], rng: Random) -> Event:
        """The event with another concept in each of ``slots``."""
        others = {slot: [one for one in self.synonyms[slot] if one != event[slot]] for slot in slots}
        return event | {slot: rng.choice(concepts) for slot, concepts in others.items()}


def read_language() -> Language:
    return Language(
        {slot: [tuple(pair.split("/")) for pair in text.split()] for slot, text in DATA["synonyms"].items()},
        [
            Kind(name, *(kind.get(part, "").split() for part in ("words", "act", "handle")))
            for name, kind in DATA["kinds"].items()
        ],
        {name: text.split() for name, text in DATA["opinion"].items()},
    )


def inflected(word: str) -> str:
    """The plural of a noun, the third person of a verb."""
    return word + ("es" if word.endswith(("s", "sh", "ch", "x", "z")) else "s")


def fill(template: str, word: Callable[[str], str]) -> str:
    """The template with ``word(name)`` for each {name}, inflected where an s follows the brace."""

    def one(match: re.Match[str]) -> str:
        return inflected(word(match[1])) if match[2] else word(match[1])

    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r"\{(\w+)\}(s\b)?", one, template))


def say(template: str, event: Event, rng: Random) -> str:
    """The event with any of the synonyms of each of its concepts."""
    return fill(template, lambda slot: rng.choice(event[slot]))


def told_and_implied(language: Language, true: bool, rng: Random) -> tuple[str, str]:
    """What somebody does to a thing of some kind, and a statement that follows from it, or does not."""
    kind, event = rng.choice(language.kinds), language.event(rng)
    told = say(SENTENCES["told"], event | {"word": (rng.choice(kind.words),)}, rng)
    wrong = "" if true else rng.choice(["kind", "kind", "person", "deed"])
    if wrong == "kind":
        kind = rng.choice([other for other in language.kinds if other != kind])
    elif wrong:
        event = language.changed(event, [wrong], rng)
    return told, say(SENTENCES["implied"], event | {"kind": (kind.name,)}, rng)


def about_kind(language: Language, template: str, kind: Kind, doer: Kind, rng: Random) -> str:
    """A sentence on a thing of ``kind`` with a verb of ``doer``: sensible where they are the same."""
    words = {
        "word": tuple(kind.words),
        "kind": (kind.name,),
        "act": tuple(doer.act),
        "handle": tuple(doer.handle),
    }
    return say(template, language.event(rng) | words, rng)


def opinion(language: Language, template: str, good: bool, rng: Random) -> str:
    """A sentence on a work that its speaker likes, or does not."""
    tones = [language.opinion["bad"], language.opinion["good"]]
    verdicts = [language.opinion["blame"], language.opinion["applause"]]
    words = language.opinion | {
        "tone": tones[good], "opposite": tones[not good], "verdict": verdicts[good], "reverse": verdicts[not good],
    }  # fmt: skip
    return fill(template, lambda name: rng.choice(words[name]))


def document(language: Language, rng: Random) -> str:
    draw = rng.random()
    if draw < 0.4:
        sentences = _accounts(language, rng)
    elif draw < 0.65:
        sentences = _inference(language, rng)
    elif draw < 0.8:
        kind = rng.choice(language.kinds)
        names = [rng.choice(["act", "handle" if kind.handle else "act", "definition"]) for _ in range(4)]
        sentences = [about_kind(language, rng.choice(SENTENCES[name]), kind, kind, rng) for name in names]
    else:
        good = rng.random() < 0.5
        sentences = [opinion(language, rng.choice(SENTENCES["opinion"]), good, rng) for _ in range(4)]
    return " ".join(f"{sentence} ." for sentence in sentences)


def _accounts(language: Language, rng: Random) -> list[str]:
    event, changes = language.event(rng), rng.choice([0, 0, 0, 1, 1, 2, 2, 3, 4, 5])
    other = language.changed(event, rng.sample(SLOTS, changes), rng)
    degree = DATA["degrees"][len(SLOTS) - changes]
    verdict = fill(SENTENCES["agreement"], lambda _: degree)
    return [say(SENTENCES["event"], event, rng), say(SENTENCES["event"], other, rng), verdict]


def _inference(language: Language, rng: Random) -> list[str]:
    true = rng.random() < 0.5
    told, implied = told_and_implied(language, true, rng)
    words = {"implied": implied, "answer": DATA["answers"][true]}
    return [told, fill(SENTENCES["inference"], lambda name: words[name])]


def documents(seed: int, size: int) -> Iterator[str]:
    """Documents until ``size`` bytes are reached, without end where it is 0; a pure function of the seed."""
    language, rng, written = read_language(), Random(seed), 0
    while written < size or not size:
        text = document(language, rng)
        written += len(text) + 1
        yield text


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def vocabulary() -> list[str]:
    """WordPiece entries: special tokens, stops, letters (so that any English word has a spelling), the two
    endings, and every word of the language."""
    words: list[str] = ["an"]

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            words.extend(value)  # names of kinds are words too
            value = list(value.values())
        if isinstance(value, list):
            for one in value:
                collect(one)
        else:
            words.extend(re.findall("[a-z]+", re.sub(r"\{\w+\}s?", "", value)))

    for part in DATA.values():
        collect(part)
    inside = [f"##{letter}" for letter in _LETTERS]
    return list(dict.fromkeys([*SPECIAL, *".,?", *_LETTERS, *inside, "##es", *words]))
