from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation.candidates.models import Candidate, load_model, load_tokenizer
from evaluation.finetuning.scores import complete, prepare
from evaluation.measures.squad import answer_f1
from evaluation.sources.catalogue import find_task
from evaluation.sources.loading import load
from evaluation.tasks import answer_spans
from evaluation.tasks.answer_spans import Question
from evaluation.tasks.encoded import Encoded
from infra.errors import UserError
from infra.settings.sections import Evaluation
from tests.evaluation.test_bad_official import SQUAD_START
from tests.evaluation.test_hub_tasks import hub_split
from tests.evaluation.test_official import write

LONG = " ".join(["the", "film", "is", "very"] * 30)


def question(context: str, answer: str, text: str = "who ?") -> Question:
    return Question("1", text, context, (answer,), (context.index(answer),))


def test_windows_cover_the_context_and_hold_the_answer(encoder: str) -> None:
    context = f"{LONG} red car {LONG}"
    windows = answer_spans.encode(load_tokenizer(encoder), [question(context, "red car")], 32)
    assert all(len(ids) <= 32 for ids in windows.encoded.input_ids)
    covered = {int(start) for spans in windows.offsets for start, _ in spans if start >= 0}
    assert len(covered) == len(context.split())
    starts, ends = windows.encoded.targets["start"], windows.encoded.targets["end"]
    holding = np.flatnonzero(starts)
    assert 1 <= len(holding) < len(windows.question)
    for window in holding:
        spans = windows.offsets[window]
        assert context[spans[starts[window], 0] : spans[ends[window], 1]] == "red car"
    assert (starts[np.setdiff1d(np.arange(len(starts)), holding)] == 0).all()


def test_a_long_question_leaves_room_for_the_context(encoder: str) -> None:
    asked = question("a red car", "red", text=LONG)
    windows = answer_spans.encode(load_tokenizer(encoder), [asked], 32)
    assert all((spans[:, 0] >= 0).sum() >= 3 for spans in windows.offsets)


def test_best_answer_over_windows(encoder: str) -> None:
    asked = [question(f"{LONG} red car {LONG}", "red car"), question("a house", "house")]
    windows = answer_spans.encode(load_tokenizer(encoder), asked, 32)
    logits = []
    for window, ids in enumerate(windows.encoded.input_ids):
        scores = np.zeros((2, len(ids)), np.float32)
        scores[0, windows.encoded.targets["start"][window]] = 5
        scores[1, windows.encoded.targets["end"][window]] = 5
        logits.append(scores)
    assert answer_spans.best_answers(windows, logits, asked) == ["red car", "house"]
    assert answer_spans.best_answers(windows, logits, asked) == [one.answers[0] for one in asked]


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.booleans()), min_size=1, max_size=18))
def test_best_span_is_the_best_of_all(tokens: list[tuple[int, int, bool]]) -> None:
    """Against all pairs; with at most 20 tokens the n-best lists leave nothing out."""
    start, end = np.asarray([s for s, _, _ in tokens], float), np.asarray([e for _, e, _ in tokens], float)
    allowed = np.asarray([a for _, _, a in tokens])
    pairs = [
        start[i] + end[j]
        for i in range(len(tokens))
        for j in range(i, len(tokens))
        if allowed[i] and allowed[j] and j - i < answer_spans.MAX_ANSWER_TOKENS
    ]
    found = answer_spans.best_span(start, end, allowed)
    if not pairs:
        assert found is None
    else:
        assert found is not None
        score, first, last = found
        assert score == max(pairs) == start[first] + end[last]
        assert first <= last


def test_no_span_is_longer_than_thirty_tokens() -> None:
    start, end = np.zeros(60), np.zeros(60)
    start[0] = end[59] = 10.0
    end[29], end[30] = 1.0, 5.0
    assert answer_spans.best_span(start, end, np.ones(60, bool)) == (11.0, 0, 29)


def test_the_lists_hold_the_twenty_best() -> None:
    """The best starts all come after the best ends: no span is left, although others exist."""
    ends, starts = np.arange(40) < 20, np.arange(40) >= 20
    assert answer_spans.best_span(9.0 * starts, 9.0 * ends, np.ones(40, bool)) is None
    starts[20] = False
    assert answer_spans.best_span(9.0 * starts, 9.0 * ends, np.ones(40, bool)) == (9.0, 0, 0)


def test_of_equal_windows_the_first_answers() -> None:
    spans = [np.asarray([[-1, -1], [0, 3]]), np.asarray([[-1, -1], [4, 7]])]
    windows = answer_spans.Windows(Encoded([], []), [0, 0], spans)
    asked = [Question("1", "?", "red car", (), ())]
    assert answer_spans.best_answers(windows, [np.zeros((2, 2))] * 2, asked) == ["red"]


def test_a_question_without_an_answer_points_to_its_first_token(encoder: str) -> None:
    asked = [Question("1", "who ?", "a red car", (), ())]
    targets = answer_spans.encode(load_tokenizer(encoder), asked, 32).encoded.targets
    assert (targets["start"].tolist(), targets["end"].tolist()) == ([0], [0])


@pytest.mark.parametrize(
    ("context", "text", "start", "place"),
    [("red car", "red", 0, 0), ("red car", "red", -3, 0), ("xred", "red", -2, 1), ("baaa", "aa", 3, 2)],
)
def test_the_nearest_occurrence(context: str, text: str, start: int, place: int) -> None:
    """At the beginning of the context, before it, and among occurrences that overlap."""
    assert answer_spans._nearest(context, text, start) == place


def test_questions_without_answers_need_a_task_that_allows_them(tmp_path: Path) -> None:
    path = tmp_path / "v2.json"
    row = {"id": "1", "question": "?", "answers": []}
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "a red car", "qas": [row]}]}]}))
    with pytest.raises(UserError, match="no answers; for a v2.0 file, name the task SQuAD2"):
        answer_spans.read_questions(str(path))
    questions = answer_spans.read_questions(str(path), no_answer=True)
    with pytest.raises(UserError, match="question 1: no answers; for v2.0, name the task SQuAD2"):
        answer_spans.align_answers(questions, "here")
    moved = Question("2", "?", "a red car", ("red",), (0,))
    aligned, notes = answer_spans.align_answers([*questions, moved], "here", no_answer=True)
    assert [item.starts for item in aligned] == [(), (2,)]
    assert len(notes) == 1


def test_one_allowed_token_is_the_answer_and_none_is_no_answer() -> None:
    logits, allowed = np.arange(4.0), np.zeros(4, bool)
    assert answer_spans.best_span(logits, logits, allowed) is None
    allowed[2] = True
    assert answer_spans.best_span(logits, logits, allowed) == (4.0, 2, 2)


def test_no_answer_is_chosen_where_every_window_prefers_it() -> None:
    """Two windows of one question; the first token of each is [CLS]."""
    spans = np.asarray([[-1, -1], [0, 3], [4, 7], [8, 11]])
    prefers, finds = (
        np.asarray(logits, np.float32)
        for logits in ([[5, 1, 0, 0], [5, 0, 2, 0]], [[1, 0, 3, 0], [1, 0, 1, 0]])
    )
    asked = [Question("1", "?", "red car day", (), ()), Question("2", "?", "a house", (), ())]

    def answer(*logits: np.ndarray, **more: bool) -> list[str]:
        count = len(logits)
        windows = answer_spans.Windows(Encoded([], []), [0] * count, [spans] * count)
        return answer_spans.best_answers(windows, logits, asked, **more)

    assert answer(prefers, no_answer=True) == ["", ""]  # 10 is above 1 + 2; the second question has no window
    assert answer(prefers) == ["red car", ""]
    assert (
        answer(prefers, finds, no_answer=True) == answer(finds, prefers, no_answer=True) == ["car", ""]
    )  # 1 + 1 is below 3 + 1
    for side in range(2):  # [CLS] counts as start and as end: 0 + 9 and 9 + 0 are above 1 + 2
        one_sided = prefers.copy()
        one_sided[:, 0] = 0
        one_sided[side, 0] = 9
        assert answer(one_sided, no_answer=True) == ["", ""]
    tie = prefers.copy()
    tie[:, 0] = 1.5
    assert answer(tie, no_answer=True) == ["red car", ""]


@pytest.mark.parametrize(("length", "budget", "overlap"), [(30, 7, 10), (300, 64, 100), (400, 64, 128)])
def test_room_for_the_question_and_overlap(encoder: str, length: int, budget: int, overlap: int) -> None:
    """The question has at most 64 tokens and a quarter of the window; windows overlap by a third, at most
    128."""
    tokenizer = load_tokenizer(encoder)
    context = " ".join(["red"] * 1000)
    for words in (budget, budget + 1):
        windows = answer_spans.encode(
            tokenizer, [Question("1", f" {'day ' * words}", context, (), ())], length
        )
        first, second = (set(map(tuple, spans.tolist())) - {(-1, -1)} for spans in windows.offsets[:2])
        assert len(first) == length - budget - 3
        assert len(first & second) == overlap
    assert (windows.encoded.targets["start"] == 0).all()


@pytest.mark.parametrize(
    ("answer", "start", "place"),
    [("the", 0, (1, 1)), ("red car", 4, (2, 3)), ("car", 8, (3, 3)), ("ed", 5, (2, 2)),
     ("re", 4, (2, 2)), ("day", 12, (0, 0)), ("car day", 8, (0, 0)), ("ed car", 5, (2, 3))],
)  # fmt: skip
def test_tokens_of_an_answer(answer: str, start: int, place: tuple[int, int]) -> None:
    """Of a window that ends before the last word. A token that has a part of the answer belongs to it."""
    spans = np.asarray([[-1, -1], [0, 3], [4, 7], [8, 11], [-1, -1]])
    asked = Question("1", "?", "the red car day", (answer,), (start,))
    assert answer_spans._answer_tokens(spans, asked) == place


def test_a_token_beside_an_answer_does_not_belong_to_it() -> None:
    spans = np.asarray([[-1, -1], [0, 3], [3, 6], [6, 9], [-1, -1]])
    asked = Question("1", "?", "redcarday", ("car",), (3,))
    assert answer_spans._answer_tokens(spans, asked) == (2, 2)


def test_learns_to_find_a_word(encoder: str, tmp_path: Path) -> None:
    generator = random.Random(0)
    for name, count in (("train", 200), ("dev", 40)):
        paragraphs = []
        for number in range(count):
            words = generator.choices(("the", "film", "is", "very", "day"), k=6)
            words.insert(generator.randrange(7), "red")
            context = " ".join(words)
            answer = {"text": "red", "answer_start": context.index("red")}
            row = {"id": str(number), "question": "who ?", "answers": [answer]}
            paragraphs.append({"context": context, "qas": [row]})
        content = {"version": "1.1", "data": [{"paragraphs": paragraphs}]}
        (tmp_path / f"{name}-v1.1.json").write_text(json.dumps(content))
    settings = Evaluation(tasks=("SQuAD",), epochs=4, batch_size=16, learning_rate=5e-3, data=str(tmp_path))
    plan = prepare([Candidate("m", encoder)], settings, str(tmp_path / "scores"))
    (result,) = complete(plan, workers=1)["m"]["SQuAD"]
    assert result["metrics"]["exact_match"] > 0.9
    assert (
        prepare([Candidate("m", encoder)], dataclasses.replace(settings), str(tmp_path / "scores")).unfinished
        == []
    )


def test_a_classifier_of_three_classes_gets_a_head_of_two_outputs(encoder: str, tmp_path: Path) -> None:
    task = find_task("SQuAD")
    classifier = load_model(Candidate("m", encoder), find_task("MNLI"), seed=0)
    classifier.save_pretrained(tmp_path)
    model = load_model(Candidate("m", str(tmp_path)), task, seed=0)
    output = model(input_ids=torch.ones(1, 5, dtype=torch.long))
    assert output.start_logits.shape == output.end_logits.shape == (1, 5)


def test_shared_answers_are_whole_in_some_window(shared_dir: Path) -> None:
    from evaluation.sources.catalogue import find_task
    from evaluation.sources.loading import load

    questions = load(find_task("SQuAD"), "dev", str(shared_dir / "data")).questions
    tokenizer = load_tokenizer(str(shared_dir / "teacher"))
    windows = answer_spans.encode(tokenizer, questions, 384)
    logits = []
    for window, ids in enumerate(windows.encoded.input_ids):
        scores = np.zeros((2, len(ids)), np.float32)
        scores[0, windows.encoded.targets["start"][window]] = 5
        scores[1, windows.encoded.targets["end"][window]] = 5
        logits.append(scores)
    # Word pieces cannot end inside a piece, so a few gold spans gain characters.
    found = answer_spans.best_answers(windows, logits, questions)
    f1 = [answer_f1(text, item.answers) for text, item in zip(found, questions, strict=True)]
    assert np.mean(f1) > 0.98


WRONG_STARTS = [
    # context, answer, answer_start, where it stands
    ("It is red.", "red", 7, 6),
    ("red, red and red", "red", 6, 5),
    ("It is red.", "red", 60, 6),
    ("It is red.", "red", -2, 6),
    ("It is red.", " red", 5, 6),
]


@pytest.mark.parametrize("source", ["file", "hub"])
def test_an_answer_is_looked_for_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Nearest to its answer_start; one that the context does not have is left out, and counted."""
    rows = [*WRONG_STARTS, ("It is red.", "blue", 6, None), ("It is red.", "red", 6, 6)]
    columns: dict[str, list[Any]] = {
        "id": [f"q{number}" for number in range(len(rows))],
        "question": ["What?"] * len(rows),
        "context": [context for context, *_ in rows],
        "answers": [{"text": [answer], "answer_start": [start]} for _, answer, start, _ in rows],
    }
    if source == "hub":
        split = hub_split(monkeypatch, "SQuAD", **columns)
    else:
        paragraphs = [
            {
                "context": context,
                "qas": [
                    {"id": id_, "question": question, "answers": [dict(zip(answers, cells, strict=True))]}
                    for cells in zip(*answers.values(), strict=True)
                ],
            }
            for id_, question, context, answers in zip(*columns.values(), strict=True)
        ]
        write(tmp_path, "train-v1.1.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
        split = load(find_task("SQuAD"), "train", str(tmp_path))
    kept = [row for row in rows if row[3] is not None]
    assert [item.starts for item in split.questions] == [(place,) for *_, place in kept]
    for item in split.questions:
        assert item.context[item.starts[0] :].startswith(item.answers[0])
    moved, absent = split.notes[:2]
    start = "SQuAD train: answers that are not at their answer_start, moved to the nearest occurrence: 4"
    assert moved.startswith(f"{start} (first: ")
    assert absent.startswith("SQuAD train: answers that do not occur in their context, left out: 1, ")
    assert "left out: 1 (first: question q5 of " in absent


@pytest.mark.parametrize(
    ("content", "says"),
    [('[{"paragraphs": 1}]', "data[0]: field 'paragraphs' is not a list"),
     ('[{"paragraphs": [{"context": 1}]}]', "data[0].paragraphs[0]: field 'context' is not a text"),
     ('[{"paragraphs": [{"context": "a", "qas": [{"answers": [{"text": "a", "answer_start": "0"}]}]}]}]',
      "data[0].paragraphs[0].qas[0]: field 'answer_start' is not a whole number")],
)  # fmt: skip
def test_a_field_of_another_type_is_named(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(f'{{"data": {content}}}')
    with pytest.raises(UserError) as caught:
        answer_spans.read_questions(str(path))
    assert str(caught.value) == f"{path}: {says}"


def test_an_answer_that_does_not_occur_leaves_the_others(tmp_path: Path) -> None:
    answers = '[{"text": "blue", "answer_start": 6}, {"text": "red", "answer_start": 6}]}]}]}]}'
    split = load(find_task("SQuAD"), "dev", write(tmp_path, "dev-v1.1.json", SQUAD_START + answers))
    assert [(item.answers, item.starts) for item in split.questions] == [(("red",), (6,))]
