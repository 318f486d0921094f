"""The demo's language: words and sentences from ``language.yaml``, and the running text made of them.

A document tells a story and its consequences, describes things, or judges a work. No sentence names a word's
class directly; the class shows only in the words that occur with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import yaml

DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("language.yaml").read_text(encoding="utf-8"))
SENTENCES: dict[str, Any] = DATA["sentences"]
WORDS = {name: words.split() for name, words in DATA["words"].items()}
"""Class -> its words, the frequent ones first."""
KINDS = {name: {part: words.split() for part, words in kind.items()} for name, kind in DATA["kinds"].items()}
"""Kind of things -> the ``word`` for one, how they ``act``, and what people do to some (``handle``)."""
OPPOSITE = {"good": "bad", "bad": "good", "applause": "blame", "blame": "applause"}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True)
class Author:
    """Says sentences with words drawn from classes."""

    words: Mapping[str, Sequence[str]]
    rng: Random
    skew: float = 2.0
    """How much more frequent a class's first words are: word x of n has density x^(1 / skew - 1)."""

    def pick(self, words: Sequence[str]) -> str:
        return words[int(len(words) * self.rng.random() ** self.skew)]

    def say(self, template: str, **own: Sequence[str]) -> str:
        """The sentence with a word for each {class}, inflected where an s follows the brace; ``own`` has
        classes of this sentence alone."""
        classes = {**self.words, **own}

        def word(match: re.Match[str]) -> str:
            picked = self.pick(classes[match[1]])
            return inflected(picked) if match[2] else picked

        return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r"\{(\w+)\}(s\b)?", word, template)) + " ."

    def judge(self, good: bool) -> str:
        """An opinion on a work: praise, or its opposite."""
        words = {} if good else {name: self.words[other] for name, other in OPPOSITE.items()}
        return self.say(self.rng.choice(SENTENCES["opinion"]), **words)


def inflected(word: str) -> str:
    """The plural of a noun, the third person of a verb."""
    return word + ("es" if word.endswith(("s", "sh", "ch", "x", "z")) else "s")


def _story(author: Author) -> list[str]:
    """Two events, then a third in two sentences: one names a thing, the other only the kind of thing."""
    kind = author.rng.choice(list(KINDS))
    person, deed = author.pick(WORDS["person"]), author.pick(WORDS["deed"])
    own = {"person": [person], "deed": [deed], "kind": [kind], "word": KINDS[kind]["word"]}
    told = [author.say(author.rng.choice(SENTENCES[name]), **own) for name in ("event", "event", "told")]
    return [*told, author.say(SENTENCES["implied"], **own)]


def _facts(author: Author) -> list[str]:
    name, kind = author.rng.choice(list(KINDS.items()))
    sentences = ["act", "handle" if "handle" in kind else "act", "definition"]
    templates = [author.rng.choice(SENTENCES[author.rng.choice(sentences)]) for _ in range(4)]
    return [author.say(one, **kind, kind=[name]) for one in templates]


def _review(author: Author) -> list[str]:
    good = author.rng.random() < 0.5
    return [author.judge(good) for _ in range(4)]


def documents(seed: int, size: int) -> Iterator[str]:
    """Documents until ``size`` bytes are reached, without end where it is 0; a pure function of the seed."""
    author, written = Author(WORDS, Random(seed)), 0
    while written < size or not size:
        text = " ".join(author.rng.choice((_story, _facts, _facts, _review, _review))(author))
        written += len(text) + 1
        yield text


def vocabulary() -> list[str]:
    """WordPiece entries: special tokens, stops, letters (so that any English word has a spelling), the two
    endings, and every word of the language."""
    of_kinds = [part for kind in KINDS.values() for part in kind.values()]
    said = str([*WORDS.values(), *KINDS, *SENTENCES.values(), *of_kinds])
    words = re.findall("[a-z]+", re.sub(r"\{\w+\}s?", "", said))
    inside = [f"##{letter}" for letter in ascii_lowercase]
    return list(dict.fromkeys([*SPECIAL, *".,?", *ascii_lowercase, *inside, "##es", "an", *words]))
