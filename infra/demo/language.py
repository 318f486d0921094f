"""The demo's language: words and sentences from ``language.yaml``, and the running text made of them.

A document tells what somebody does, or judges a work. Whether a word is one of praise is never said: it shows
in the company that the word keeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("language.yaml").read_text(encoding="utf-8"))
SENTENCES: dict[str, list[str]] = DATA["sentences"]
WORDS: dict[str, list[str]] = {name: text.split() for name, text in DATA["words"].items()}
"""Class -> its words."""
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SKEW = 2.0
"""How much more frequent a class's first words are in the text: word x of n has density x^(1 / SKEW - 1)."""


def inflected(verb: str) -> str:
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z")) else "s")


def fill(template: str, word: Callable[[str], str]) -> str:
    """The template with ``word(name)`` for each {name}, in the third person where an s follows the brace."""

    def one(match: re.Match[str]) -> str:
        return inflected(word(match[1])) if match[2] else word(match[1])

    return re.sub(r"\{(\w+)\}(s\b)?", one, template)


def pick(name: str, rng: Random, step: int = 0) -> str:
    """A word of the class, early ones more often, as in text; with ``step`` any of every step-th word."""
    words, skew = (WORDS[name][::step], 1.0) if step else (WORDS[name], SKEW)
    return words[int(len(words) * rng.random() ** skew)]


def opinion(template: str, good: bool, rng: Random, step: int = 0) -> str:
    """A sentence on a work that its speaker likes, or does not."""
    tones, verdicts = ("bad", "good"), ("blame", "applause")
    names = {"tone": tones[good], "opposite": tones[not good]}
    names |= {"verdict": verdicts[good], "reverse": verdicts[not good]}
    return fill(template, lambda name: pick(names.get(name, name), rng, step))


def _story(rng: Random) -> list[str]:
    return [fill(rng.choice(SENTENCES["event"]), lambda name: pick(name, rng)) for _ in range(3)]


def _review(rng: Random) -> list[str]:
    good = rng.random() < 0.5
    return [opinion(rng.choice(SENTENCES["opinion"]), good, rng) for _ in range(4)]


def documents(seed: int, size: int) -> Iterator[str]:
    """Documents until ``size`` bytes are reached, without end where it is 0; a pure function of the seed."""
    rng, written = Random(seed), 0
    while written < size or not size:
        text = " ".join(f"{sentence} ." for sentence in rng.choice((_story, _review, _review))(rng))
        written += len(text) + 1
        yield text


def vocabulary() -> list[str]:
    """WordPiece entries: special tokens, stops, letters (so that any English word has a spelling), the two
    endings, and every word of the language."""
    words = re.findall("[a-z]+", re.sub(r"\{\w+\}s?", "", str([*WORDS.values(), *SENTENCES.values()])))
    inside = [f"##{letter}" for letter in LETTERS]
    return list(dict.fromkeys([*SPECIAL, *".,?", *LETTERS, *inside, "##es", *words]))
