"""The demo's language: words and sentences from ``language.yaml``, and the running text made of them.

A document tells an event twice and says how far the two agree, infers something, says what things are and
do, or judges a work. All that the labelled tasks ask can be learned from the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("language.yaml").read_text(encoding="utf-8"))
SENTENCES: dict[str, Any] = DATA["sentences"]
SLOTS: tuple[str, ...] = tuple(DATA["synonyms"])
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"

Words = Sequence[str]
Event = Mapping[str, Words]
"""What may stand in each slot of a sentence: words that mean the same."""


@dataclass(frozen=True)
class Language:
    synonyms: dict[str, list[Words]]
    """Slot of an event -> sets of synonyms."""
    kinds: dict[str, dict[str, Words]]
    """Kind of things -> their ``words``, how they ``act``, and what people do to them alone (``handle``)."""
    opinion: dict[str, Words]

    def every(self, step: int) -> Language:
        """With every ``step``-th word of a class, or set of synonyms, alone; verbs stay."""
        return Language(
            self.synonyms,
            {name: kind | {"words": kind["words"][::step]} for name, kind in self.kinds.items()},
            {name: words[::step] for name, words in self.opinion.items()},
        )

    def classes(self) -> list[list[str]]:
        """Every word once, with those that may stand where it stands."""
        kinds, opinion = self.kinds.values(), self.opinion
        alike = [("good", "bad"), ("applause", "blame"), ("work",), ("aspect",)]
        return [
            *([word for words in found for word in words] for found in self.synonyms.values()),
            *([word for kind in kinds for word in kind[part]] for part in ("words", "act", "handle")),
            *([word for name in names for word in opinion[name]] for names in alike),
            list(self.kinds),
        ]

    def event(self, rng: Random) -> Event:
        return {slot: rng.choice(found) for slot, found in self.synonyms.items()}

    def changed(self, event: Event, slots: Words, rng: Random) -> Event:
        """The event with other words, of another meaning, in each of ``slots``."""
        others = {slot: [words for words in self.synonyms[slot] if words != event[slot]] for slot in slots}
        return {**event, **{slot: rng.choice(found) for slot, found in others.items()}}


def read_language() -> Language:
    return Language(
        {slot: [pair.split("/") for pair in text.split()] for slot, text in DATA["synonyms"].items()},
        {
            name: {part: kind.get(part, "").split() for part in ("words", "act", "handle")}
            for name, kind in DATA["kinds"].items()
        },
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


def say(template: str, words: Event, rng: Random) -> str:
    """The template with any of the words that may stand in each of its slots."""
    return fill(template, lambda slot: rng.choice(words[slot]))


def told_and_implied(language: Language, true: bool, rng: Random) -> tuple[str, str]:
    """What somebody does to a thing of some kind, and a statement that follows from it, or does not."""
    kind, event = rng.choice(list(language.kinds)), language.event(rng)
    told = say(SENTENCES["told"], {**event, "word": [rng.choice(language.kinds[kind]["words"])]}, rng)
    wrong = "" if true else rng.choice(["kind", "kind", "person", "deed"])
    if wrong == "kind":
        kind = rng.choice([other for other in language.kinds if other != kind])
    elif wrong:
        event = language.changed(event, [wrong], rng)
    return told, say(SENTENCES["implied"], {**event, "kind": [kind]}, rng)


def about_kind(language: Language, template: str, kind: str, doer: str, rng: Random) -> str:
    """A sentence on a thing of ``kind`` with a verb of ``doer``: sensible where they are the same."""
    words = {"kind": [kind], "word": language.kinds[kind]["words"], **language.kinds[doer]}
    return say(template, {**language.event(rng), **words}, rng)


def opinion(language: Language, template: str, good: bool, rng: Random) -> str:
    """A sentence on a work that its speaker likes, or does not."""
    tones, verdicts = ("bad", "good"), ("blame", "applause")
    names = {"tone": tones[good], "opposite": tones[not good]}
    names |= {"verdict": verdicts[good], "reverse": verdicts[not good]}
    return fill(template, lambda name: rng.choice(language.opinion[names.get(name, name)]))


def _accounts(language: Language, rng: Random) -> list[str]:
    event, changes = language.event(rng), rng.choice([0, 0, 0, 1, 1, 2, 2, 3, 4, 5])
    other = language.changed(event, rng.sample(SLOTS, changes), rng)
    told = [say(SENTENCES["event"], one, rng) for one in (event, other)]
    degree = DATA["degrees"][len(SLOTS) - changes].split("/")
    return [*told, say(SENTENCES["agreement"], {"degree": degree}, rng)]


def _inference(language: Language, rng: Random) -> list[str]:
    true = rng.random() < 0.5
    told, implied = told_and_implied(language, true, rng)
    words = {"implied": [implied], "answer": DATA["answers"][true].split("/")}
    return [told, say(SENTENCES["inference"], words, rng)]


def _facts(language: Language, rng: Random) -> list[str]:
    kind = rng.choice(list(language.kinds))
    names = ["act", "handle" if language.kinds[kind]["handle"] else "act", "definition"]
    templates = [rng.choice(names) for _ in range(4)]
    return [about_kind(language, rng.choice(SENTENCES[name]), kind, kind, rng) for name in templates]


def _review(language: Language, rng: Random) -> list[str]:
    good = rng.random() < 0.5
    return [opinion(language, rng.choice(SENTENCES["opinion"]), good, rng) for _ in range(4)]


def documents(seed: int, size: int) -> Iterator[str]:
    """Documents until ``size`` bytes are reached, without end where it is 0; a pure function of the seed."""
    language, rng, written = read_language(), Random(seed), 0
    shares = [_accounts] * 8 + [_inference] * 5 + [_facts] * 4 + [_review] * 3
    while written < size or not size:
        text = " ".join(f"{sentence} ." for sentence in rng.choice(shares)(language, rng))
        written += len(text) + 1
        yield text


def vocabulary() -> list[str]:
    """WordPiece entries: special tokens, stops, letters (so that any English word has a spelling), the two
    endings, and every word of the language."""
    texts = [*DATA["kinds"], DATA["degrees"], DATA["answers"]]
    for part in (SENTENCES, DATA["synonyms"], DATA["opinion"], *DATA["kinds"].values()):
        texts += part.values()
    words = re.findall("[a-z]+", re.sub(r"\{\w+\}s?", "", str(texts)))
    inside = [f"##{letter}" for letter in LETTERS]
    return list(dict.fromkeys([*SPECIAL, *".,?", *LETTERS, *inside, "##es", "an", *words]))
