"""The generated language: the same on every machine, large enough, and inflected as English is."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice

import pytest

from infra.demo.documents import documents
from infra.demo.morphology import article, participle, past, plural, third_person
from infra.demo.wordpiece import wordpiece_vocabulary
from tests.conftest import ROOT

MEGABYTES_2 = 2_000_000


@pytest.fixture(scope="module")
def text() -> str:
    return "\n".join(documents(1, MEGABYTES_2))


def test_text_is_a_pure_function_of_the_seed() -> None:
    first, again, other = (list(islice(documents(seed, 10**6), 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_longer_text_begins_with_the_shorter() -> None:
    short, long = list(documents(1, 5_000)), list(documents(1, 20_000))
    assert long[: len(short)] == short


def test_size_and_number_of_word_forms(text: str) -> None:
    assert len(text.encode()) >= MEGABYTES_2
    forms = set(re.findall(r"[a-z]+", text.lower()))
    assert 2_000 <= len(forms) <= 10_000


def test_documents_are_lines_of_sentences(text: str) -> None:
    lines = text.splitlines()
    assert len(lines) > 1_000
    for line in lines[:200]:
        assert re.fullmatch(r"([A-Z][A-Za-z, ]*[.]( |$))+", line), line
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("dog", "dogs"), ("fox", "foxes"), ("church", "churches"), ("cherry", "cherries"),
        ("monkey", "monkeys"),
        ("mouse", "mice"), ("goose", "geese"), ("knife", "knives"), ("child", "children"), ("deer", "deer"),
    ],
)  # fmt: skip
def test_plurals(noun: str, expected: str) -> None:
    assert plural(noun) == expected


@pytest.mark.parametrize(
    ("verb", "third", "simple_past", "perfect"),
    [
        ("paint", "paints", "painted", "painted"),
        ("carry", "carries", "carried", "carried"),
        ("buy", "buys", "bought", "bought"),
        ("push", "pushes", "pushed", "pushed"),
        ("drop", "drops", "dropped", "dropped"),
        ("chase", "chases", "chased", "chased"),
        ("choose", "chooses", "chose", "chosen"),
        ("hide", "hides", "hid", "hidden"),
        ("free", "frees", "freed", "freed"),
        ("obey", "obeys", "obeyed", "obeyed"),
    ],
)
def test_verb_forms(verb: str, third: str, simple_past: str, perfect: str) -> None:
    assert (third_person(verb), past(verb), participle(verb)) == (third, simple_past, perfect)


def test_articles() -> None:
    assert [article(word) for word in ("dog", "apple", "Owl", "uncle")] == ["a", "an", "an", "an"]


def test_vocabulary_merges_the_most_frequent_pair_and_breaks_ties_by_order() -> None:
    words = {"abab": 3, "abc": 2, "b": 9}
    expected = ["[UNK]", "##a", "##b", "##c", "a", "b", "ab", "##ab"]
    assert wordpiece_vocabulary(words, 8, ["[UNK]"]) == expected
    assert wordpiece_vocabulary(dict(reversed(words.items())), 8, ["[UNK]"]) == expected
    assert wordpiece_vocabulary(words, 100, [])[-1] in {"abab", "abc"}


def test_two_processes_make_the_same_tokenizer() -> None:
    script = (
        "from infra.demo.teacher import train_tokenizer\n"
        "texts = [f'{a}{b}ing the {b}{a}s' for a in 'bdfglm' for b in ('ra', 'lo', 'ti')]\n"
        "print(sorted(train_tokenizer(texts).get_vocab().items()))\n"
    )
    found = {
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True).stdout
        for _ in range(3)
    }
    assert len(found) == 1
