"""Predictions as a file, and the scores computed from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from evaluation.kinds import predictions
from evaluation.kinds.predictions import Answers, Predictions, task_score
from evaluation.sources.catalogue import find_task
from evaluation.tasks.task import Task
from infra.errors import UserError
from infra.files import storage


def random_classes(parts: list[str], classes: int, seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    sizes = {part: 30 + 5 * number for number, part in enumerate(parts)}
    return {
        part: Answers(
            generator.integers(0, classes, size), generator.normal(size=(size, classes)).astype(np.float32)
        )
        for part, size in sizes.items()
    }


def random_values() -> Predictions:
    generator = np.random.default_rng(0)
    labels = generator.uniform(0, 5, 40).astype(np.float32)
    return {"dev": Answers(labels, (labels + generator.normal(size=40)).astype(np.float32))}


SPANS = {"dev": Answers([("red car", "car"), ("house",), ("Straße",)], ["car", "a red house", ""])}
CASES = {
    "CoLA": random_classes(["dev"], 2),
    "MNLI": random_classes(["dev_matched", "dev_mismatched"], 3),
    "MRPC": random_classes(["dev"], 2),
    "STS-B": random_values(),
    "SQuAD": SPANS,
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Task, Predictions]:
    return find_task(request.param), CASES[request.param]


def test_what_is_read_is_what_was_predicted(case: tuple[Task, Predictions], tmp_path: Path) -> None:
    task, made = case
    path = str(tmp_path / "seed-0.predictions.parquet")
    digest = predictions.publish(path, task, made)
    assert digest == storage.digest_file(path)
    found = predictions.read(path, task, digest)
    assert list(found) == task.dev_parts
    for part, answers in found.items():
        for name in ("labels", "outputs"):
            values, expected = getattr(answers, name), getattr(made[part], name)
            if task.kind == "spans":
                assert list(map(list, values)) == list(map(list, expected))
            else:
                assert values.dtype == expected.dtype
                np.testing.assert_array_equal(values, expected)
    assert predictions.score(task, found) == predictions.score(task, made)


def test_the_dev_set_itself_is_a_resample_of_the_tasks_score(case: tuple[Task, Predictions]) -> None:
    task, made = case
    weights = {part: np.ones((len(answers), 2)) for part, answers in made.items()}
    expected = task_score(task, predictions.score(task, made))
    assert predictions.resampled_score(task, made)(weights) == pytest.approx([expected, expected], abs=1e-12)
    weights[task.dev_parts[-1]][:7] = 0  # without the first examples of the last dev set
    if task.kind != "spans":
        cut = dict(made)
        last = made[task.dev_parts[-1]]
        cut[task.dev_parts[-1]] = Answers(last.labels[7:], last.outputs[7:])
        expected = task_score(task, predictions.score(task, cut))
        assert predictions.resampled_score(task, made)(weights)[0] == pytest.approx(expected, abs=1e-12)


def test_answers_are_named_by_their_rows_unless_they_have_ids() -> None:
    assert Answers(None, ["a", "b"]).ids == ["0", "1"]
    assert Answers(None, ["a", "b"], ["7", "9"]).ids == ["7", "9"]


def test_metrics_of_two_dev_sets_have_their_suffixes() -> None:
    found = predictions.score(find_task("MNLI"), CASES["MNLI"])
    assert list(found) == find_task("MNLI").metric_keys
    answers = CASES["MNLI"]["dev_mismatched"]
    right = np.mean(answers.outputs.argmax(axis=1) == answers.labels)
    assert found["accuracy_mismatched"] == right


def test_the_file_is_one_that_any_program_reads(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    predictions.publish(str(path), find_task("MNLI"), CASES["MNLI"])
    rows = parquet.read_table(path).to_pylist()
    first = CASES["MNLI"]["dev_mismatched"]
    assert rows[30] == {
        "split": "dev_mismatched",
        "example": "0",
        "label": first.labels[0],
        "output": first.outputs[0].tolist(),
    }
    predictions.publish(str(path), find_task("SQuAD"), SPANS)
    assert parquet.read_table(path).to_pylist()[1] == {
        "split": "dev", "example": "1", "label": ["house"], "output": "a red house"
    }  # fmt: skip


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path, task = tmp_path / "p.parquet", find_task("CoLA")
    digest = predictions.publish(str(path), task, CASES["CoLA"])
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"p\.parquet: these predictions are damaged") as caught:
        predictions.read(str(path), task, digest)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["CoLA", "STS-B"])
def test_outputs_that_are_not_finite_are_refused(name: str, tmp_path: Path) -> None:
    good = CASES[name]["dev"]
    outputs = good.outputs.copy()
    outputs[3] = np.nan
    with pytest.raises(UserError, match="not finite; lower evaluation.learning_rate"):
        predictions.publish(
            str(tmp_path / "p.parquet"), find_task(name), {"dev": Answers(good.labels, outputs)}
        )
    assert list(tmp_path.iterdir()) == []
