"""The generated language: the same on every machine, each word in one class, and known to its tokenizer."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from random import Random

import pytest

from infra.demo.language import KINDS, SPECIAL, WORDS, Author, documents, inflected, vocabulary
from infra.demo.make_teacher import build_tokenizer
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def text() -> str:
    return "\n".join(documents(1, 500_000))


def test_text_is_a_pure_function_of_the_seed_whatever_the_order_of_hashes() -> None:
    script = "from infra.demo.language import documents; print('\\n'.join(documents(1, 20_000)))"
    found = {
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {("\n".join(documents(1, 20_000)) + "\n").encode()}
    assert list(documents(1, 20_000)) != list(documents(2, 20_000))


def test_a_longer_text_begins_with_the_shorter() -> None:
    short, long = list(documents(1, 5_000)), list(documents(1, 20_000))
    assert long[: len(short)] == short
    assert list(itertools.islice(documents(1, 0), len(long))) == long


def test_documents_are_sentences_that_end_in_a_stop_and_rarely_repeat(text: str) -> None:
    lines = text.splitlines()
    for line in lines:
        assert re.fullmatch(r"([a-z ]+ [.] ?)+(?<= [.])", line), line
    assert len(set(lines)) > 0.99 * len(lines)


def test_the_first_words_of_a_class_are_the_most_frequent(text: str) -> None:
    said = Counter(re.findall("[a-z]+", text))
    for name in ("good", "bad"):
        words = WORDS[name]
        assert sum(said[word] for word in words[:8]) > 3 * sum(said[word] for word in words[-8:])


def test_every_word_is_in_one_class_and_in_the_text(text: str) -> None:
    words = [word for words in WORDS.values() for word in words]
    words += [word for kind in KINDS.values() for part in kind.values() for word in part]
    words += list(KINDS)
    twice = [word for word, count in Counter(words).items() if count > 1]
    assert not twice
    said = set(re.findall("[a-z]+", text))
    assert not [word for word in words if word not in said and inflected(word) not in said]


def test_a_sentence_inflects_and_has_its_articles() -> None:
    author = Author({"it": ["fox"], "one": ["owl"], "does": ["look"]}, Random(0))
    said = author.fill("a {it} {does}s {it}s and a {one}", does=["watch"])
    assert said == "a fox watches foxes and an owl ."
    assert inflected("tune") == "tunes"


def test_the_tokenizer_knows_every_word_and_its_endings(text: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == SPECIAL
    whole, endings = set(vocabulary()), {"##s", "##es"}
    for word in set(re.findall("[a-z]+", text)):
        first, *rest = tokenizer.tokenize(word)
        assert first in whole, word
        assert len(first) > 1 or word == "a", word
        assert len(rest) <= 1, word
        assert endings.issuperset(rest), word
        assert inflected(first) == word or not rest
    assert tokenizer.unk_token_id not in tokenizer("Zebras quiver, do they?")["input_ids"]
