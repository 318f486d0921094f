"""The five generated tasks, read with the loaders that read the official files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from evaluation.sources.catalogue import find_task
from evaluation.sources.loading import load
from evaluation.tasks.task import Split
from infra.demo.language import SENTENCES, WORDS, Author, documents
from infra.demo.make_teacher import build_tokenizer
from infra.demo.tasks import TASKS, TRAIN_STEP, Task, review, task_files

SEED = 3


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("glue")
    for task in TASKS:
        (root / task.name).mkdir()
        for name, text in task_files(task, SEED).items():
            (root / task.name / name).write_text(text, encoding="utf-8")
    return root


def split(glue: Path, task: Task, part: str) -> Split:
    return load(find_task(task.name), part, str(glue))


each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def test_there_is_one_task_for_each_kind_of_metric() -> None:
    assert {task.name for task in TASKS} == {"SST-2", "CoLA", "MRPC", "STS-B", "RTE"}


@each_task
def test_files_are_a_pure_function_of_the_seed(task: Task) -> None:
    assert task_files(task, SEED) == task_files(task, SEED)
    assert task_files(task, SEED) != task_files(task, SEED + 1)


@each_task
def test_the_official_loader_reads_every_row(glue: Path, task: Task) -> None:
    for part, count in (("train", task.train), ("dev", task.dev)):
        found = split(glue, task, part)
        assert len(found) == count
        assert len(found.texts[0]) == (1 if task.name in ("SST-2", "CoLA") else 2)
        assert all(text == text.strip() and len(text.split()) >= 3 for row in found.texts for text in row)


@each_task
def test_no_dev_row_stands_in_train(glue: Path, task: Task) -> None:
    assert not set(split(glue, task, "train").texts) & set(split(glue, task, "dev").texts)


@each_task
def test_labels_are_balanced(glue: Path, task: Task) -> None:
    """No class above 65 %, and STS-B spread over its whole range: the majority is no good guess."""
    for part in ("train", "dev"):
        labels = Counter(split(glue, task, part).labels)
        total = sum(labels.values())
        if task.name == "STS-B":
            assert set(labels) == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
            assert max(labels.values()) < 0.3 * total
        else:
            assert set(labels) == {0, 1}
            assert max(labels.values()) < 0.65 * total


@each_task
def test_most_dev_rows_have_words_that_train_never_shows(glue: Path, task: Task) -> None:
    seen = {word for row in split(glue, task, "train").texts for text in row for word in text.split()}
    dev = [" ".join(row).split() for row in split(glue, task, "dev").texts]
    assert sum(not seen.issuperset(words) for words in dev) > 0.85 * len(dev)


def test_training_rows_have_every_eighth_word_of_a_class(glue: Path) -> None:
    words = {
        part: set(
            " ".join(text for task in TASKS for row in split(glue, task, part).texts for text in row).split()
        )
        for part in ("train", "dev")
    }
    for name, whole in WORDS.items():
        if name in ("work", "aspect", "good", "bad"):
            assert words["train"] & set(whole) == set(whole[::TRAIN_STEP])
            assert words["dev"] & set(whole) == set(whole)


def test_a_review_has_as_many_good_opinions_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without negations the words of an opinion say its mood."""
    plain = [opinion for opinion in SENTENCES["opinion"] if "{good} and {good}" in opinion]
    monkeypatch.setitem(SENTENCES, "opinion", plain)
    good = set(WORDS["good"])
    for wanted in range(6):
        text = review(Author(WORDS, Random(wanted)), wanted, 5)
        moods = [bool(good & set(sentence.split())) for sentence in text.split(" . ")]
        assert sum(moods) == wanted


@each_task
def test_the_words_of_a_task_are_those_of_the_running_text(glue: Path, task: Task) -> None:
    """The teacher cannot know what its text never says."""
    tokenizer = build_tokenizer()
    asked = {word for row in split(glue, task, "dev").texts for text in row for word in text.split()}
    said = set(" ".join(documents(1, 1_000_000)).split())
    pieces = [{piece for word in words for piece in tokenizer.tokenize(word)} for words in (asked, said)]
    assert not pieces[0] - pieces[1]
