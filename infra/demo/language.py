"""Generates text in the demo's language from the words and sentence templates of ``language.yaml``.

A document is a story, a description of things, or a review of a work. No sentence names the class of a word
directly: only the words that occur with it show its class.
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
"""Class -> its words, from frequent to rare."""
KINDS = {name: {part: words.split() for part, words in kind.items()} for name, kind in DATA["kinds"].items()}
"""Kind of things -> its nouns (``word``), its verbs (``act``), and verbs of people for some (``handle``)."""
OPPOSITE = {"good": "bad", "bad": "good", "applause": "blame", "blame": "applause"}
"""Class -> class of opposite words."""
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True)
class Author:
    """Makes sentences from templates and words that it draws from classes."""

    words: Mapping[str, Sequence[str]]
    rng: Random
    skew: float = 2.0
    """Exponent that makes the first words of a class more frequent: a draw of the relative position x in the
    list has density proportional to x^(1 / skew - 1)."""

    def pick(self, words: Sequence[str]) -> str:
        return words[int(len(words) * self.rng.random() ** self.skew)]

    def fill(self, template: str, **own_classes: Sequence[str]) -> str:
        """Returns the sentence of a template with a drawn word for each ``{class}``. The word is inflected if
        an s follows the brace. ``own_classes`` adds or replaces classes for this sentence."""
        classes = {**self.words, **own_classes}

        def word(match: re.Match[str]) -> str:
            picked = self.pick(classes[match[1]])
            return inflected(picked) if match[2] else picked

        return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r"\{(\w+)\}(s\b)?", word, template)) + " ."

    def judge(self, good: bool) -> str:
        """Returns an opinion on a work: praise if ``good``, otherwise blame."""
        words = {} if good else {name: self.words[other] for name, other in OPPOSITE.items()}
        return self.fill(self.rng.choice(SENTENCES["opinion"]), **words)


def inflected(word: str) -> str:
    """Returns the plural of a noun, or the third person of a verb."""
    return word + ("es" if word.endswith(("s", "sh", "ch", "x", "z")) else "s")


def _story(author: Author) -> list[str]:
    """Returns two events, then a third event in two sentences: one names a thing, the other its kind."""
    kind = author.rng.choice(list(KINDS))
    person, deed = author.pick(WORDS["person"]), author.pick(WORDS["deed"])
    classes = {"person": [person], "deed": [deed], "kind": [kind], "word": KINDS[kind]["word"]}
    names = ("event", "event", "event_with_thing")
    sentences = [author.fill(author.rng.choice(SENTENCES[name]), **classes) for name in names]
    return [*sentences, author.fill(SENTENCES["event_with_kind"], **classes)]


def _facts(author: Author) -> list[str]:
    name, kind = author.rng.choice(list(KINDS.items()))
    sentences = ["act", "handle" if "handle" in kind else "act", "definition"]
    templates = [author.rng.choice(SENTENCES[author.rng.choice(sentences)]) for _ in range(4)]
    return [author.fill(template, **kind, kind=[name]) for template in templates]


def _review(author: Author) -> list[str]:
    good = author.rng.random() < 0.5
    return [author.judge(good) for _ in range(4)]


def documents(seed: int, size: int) -> Iterator[str]:
    """Yields documents until they have ``size`` bytes, or without end if ``size`` is 0. Equal seeds give
    equal documents."""
    author, written = Author(WORDS, Random(seed)), 0
    while written < size or not size:
        text = " ".join(author.rng.choice((_story, _facts, _facts, _review, _review))(author))
        written += len(text) + 1
        yield text


def vocabulary() -> list[str]:
    """Returns the WordPiece vocabulary: special tokens, punctuation, letters (which can spell any English
    word), the two endings, and every word of the language."""
    words_of_kinds = [words for kind in KINDS.values() for words in kind.values()]
    text = str([*WORDS.values(), *KINDS, *SENTENCES.values(), *words_of_kinds])
    words = re.findall("[a-z]+", re.sub(r"\{\w+\}s?", "", text))
    inside = [f"##{letter}" for letter in ascii_lowercase]
    return list(dict.fromkeys([*SPECIAL, *".,?", *ascii_lowercase, *inside, "##es", "an", *words]))
