"""The demo's language: words and sentences from ``language.yaml``, and the running text made of them.

A document tells a story and what follows from it, says what things are and do, or judges a work. A word's
class is never said outright: it shows in the company that the word keeps.
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
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SKEW = 2.0
"""How much more frequent a class's first words are in the text: word x of n has density x^(1 / SKEW - 1)."""

Words = Sequence[str]


@dataclass(frozen=True)
class Language:
    words: Mapping[str, Words]
    """Class -> its words, the frequent ones first."""
    kinds: Mapping[str, Mapping[str, Words]]
    """Kind of things -> the ``word`` for one, how they ``act``, and what people do to them (``handle``)."""
    skew: float = SKEW

    def every(self, step: int) -> Language:
        """With every ``step``-th word of a class alone, all equally frequent; kinds stay."""
        return Language({name: words[::step] for name, words in self.words.items()}, self.kinds, skew=1.0)

    def pick(self, words: Words, rng: Random) -> str:
        return words[int(len(words) * rng.random() ** self.skew)]

    def say(self, template: str, rng: Random, **own: Words) -> str:
        """The template with a word in each slot: of ``own`` where named, else of the class."""
        classes = {**self.words, **own}
        return fill(template, lambda name: self.pick(classes[name], rng))

    def opinion(self, template: str, good: bool, rng: Random) -> str:
        """A sentence on a work that its speaker likes, or does not."""
        tones, verdicts = ("bad", "good"), ("blame", "applause")
        names = {"tone": tones[good], "opposite": tones[not good]}
        names |= {"verdict": verdicts[good], "reverse": verdicts[not good]}
        return self.say(template, rng, **{slot: self.words[name] for slot, name in names.items()})


def read_language() -> Language:
    return Language(
        {name: text.split() for name, text in DATA["words"].items()},
        {
            name: {part: kind.get(part, "").split() for part in ("word", "act", "handle")}
            for name, kind in DATA["kinds"].items()
        },
    )


def inflected(word: str) -> str:
    """The plural of a noun, the third person of a verb."""
    return word + ("es" if word.endswith(("s", "sh", "ch", "x", "z")) else "s")


def fill(template: str, word: Callable[[str], str]) -> str:
    """The template with ``word(name)`` for each {name}, inflected where an s follows the brace."""

    def one(match: re.Match[str]) -> str:
        return inflected(word(match[1])) if match[2] else word(match[1])

    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r"\{(\w+)\}(s\b)?", one, template))


def _story(language: Language, rng: Random) -> list[str]:
    """Two events, and one told with a thing's word and again with its kind."""
    kind = rng.choice(list(language.kinds))
    person, deed = (language.pick(language.words[name], rng) for name in ("person", "deed"))
    own: dict[str, Words] = {"person": [person], "deed": [deed], "kind": [kind]}
    own["word"] = language.kinds[kind]["word"]
    events = [language.say(rng.choice(SENTENCES["event"]), rng, **own) for _ in range(2)]
    told = language.say(rng.choice(SENTENCES["told"]), rng, **own)
    return [*events, told, language.say(SENTENCES["implied"], rng, **own)]


def _facts(language: Language, rng: Random) -> list[str]:
    name, kind = rng.choice(list(language.kinds.items()))
    sentences = ["act", "handle" if kind["handle"] else "act", "definition"]
    templates = [rng.choice(SENTENCES[rng.choice(sentences)]) for _ in range(4)]
    return [language.say(one, rng, **kind, kind=[name]) for one in templates]


def _review(language: Language, rng: Random) -> list[str]:
    good = rng.random() < 0.5
    return [language.opinion(rng.choice(SENTENCES["opinion"]), good, rng) for _ in range(4)]


def documents(seed: int, size: int) -> Iterator[str]:
    """Documents until ``size`` bytes are reached, without end where it is 0; a pure function of the seed."""
    language, rng, written = read_language(), Random(seed), 0
    while written < size or not size:
        kind_of_document = rng.choice((_story, _facts, _facts, _review, _review))
        text = " ".join(f"{sentence} ." for sentence in kind_of_document(language, rng))
        written += len(text) + 1
        yield text


def vocabulary() -> list[str]:
    """WordPiece entries: special tokens, stops, letters (so that any English word has a spelling), the two
    endings, and every word of the language."""
    said = [*DATA["words"].values(), *DATA["kinds"], *SENTENCES.values()]
    said += [words for kind in DATA["kinds"].values() for words in kind.values()]
    words = re.findall("[a-z]+", re.sub(r"\{\w+\}s?", "", str(said)))
    inside = [f"##{letter}" for letter in LETTERS]
    return list(dict.fromkeys([*SPECIAL, *".,?", *LETTERS, *inside, "##es", "an", *words]))
