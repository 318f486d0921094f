from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation.finetuning import distillation, outputs_store
from evaluation.finetuning.distillation import TEACHER, TOKENS, distilled
from evaluation.finetuning.finetune import loss_for
from evaluation.finetuning.outputs_store import OutputsSpec, read_outputs, store_outputs
from evaluation.finetuning.scores import complete, prepare
from evaluation.models import Candidate
from evaluation.tasks.catalogue import find_task
from infra.errors import UserError
from infra.settings.sections import Evaluation

SETTINGS = Evaluation(tasks=("SST-2",), epochs=3, batch_size=16, learning_rate=3e-3, max_length=16)


def softmax64(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_classification_loss_against_float64(temperature: float) -> None:
    generator = np.random.default_rng(0)
    student, teacher = generator.standard_normal((2, 7, 3)) * 3
    labels = generator.integers(0, 3, 7)
    p, q = softmax64(teacher / temperature), softmax64(student / temperature)
    kl = (p * (np.log(p) - np.log(q))).sum(axis=-1).mean()
    ce = -np.log(softmax64(student))[np.arange(7), labels].mean()
    task = find_task("MNLI")
    loss = distilled(task, loss_for(task), temperature)(
        SimpleNamespace(logits=torch.tensor(student)),
        {"label": torch.tensor(labels), TEACHER: torch.tensor(teacher, dtype=torch.float32)},
    )
    assert float(loss) == pytest.approx(ce + temperature**2 * kl, rel=1e-5)


def test_regression_loss_by_hand() -> None:
    task = find_task("STS-B")
    targets = {"label": torch.tensor([1.0, 2.0]), TEACHER: torch.tensor([[2.0], [2.0]])}
    output = SimpleNamespace(logits=torch.tensor([[3.0], [2.0]]))
    # labels: (4 + 0) / 2, teacher: (1 + 0) / 2, at any temperature
    for temperature in (1.0, 4.0):
        assert float(distilled(task, loss_for(task), temperature)(output, targets)) == 2.5


def test_span_loss_leaves_padding_out() -> None:
    """Against float64 over each row's own tokens, whatever stands in the padding of either side."""
    generator = np.random.default_rng(1)
    lengths, width, stored, temperature = [3, 6], 6, 9, 2.0
    student = generator.standard_normal((2, 2, width)) * 2  # [side, B, L]
    teacher = generator.standard_normal((2, 2, stored)) * 2  # [B, side, stored L]
    labels = {"start": torch.tensor([0, 5]), "end": torch.tensor([2, 1])}
    expected = 0.0
    for side, name in enumerate(("start", "end")):
        for row, length in enumerate(lengths):
            p = softmax64(teacher[row, side, :length] / temperature)
            q = softmax64(student[side, row, :length] / temperature)
            expected += temperature**2 * (p * (np.log(p) - np.log(q))).sum() / 4
            expected -= np.log(softmax64(student[side, row])[labels[name][row]]) / 4
    task = find_task("SQuAD")
    output = SimpleNamespace(start_logits=torch.tensor(student[0]), end_logits=torch.tensor(student[1]))
    targets = labels | {
        TEACHER: torch.tensor(teacher, dtype=torch.float32),
        TOKENS: torch.tensor(lengths),
    }
    assert float(distilled(task, loss_for(task), temperature)(output, targets)) == pytest.approx(
        expected, rel=1e-5
    )


def spec(rows: int = 2500, shape: tuple[int, ...] = (3,), teacher: str = "a") -> OutputsSpec:
    return OutputsSpec(shape, rows, {"teacher": teacher})


def numbers(wanted: OutputsSpec) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((wanted.rows, *wanted.shape)).astype(np.float32)


def fill(root: Path, wanted: OutputsSpec) -> list[range]:
    """Store ``numbers``; the ranges that had to be computed."""
    asked: list[range] = []

    def predict(rows: range) -> np.ndarray:
        asked.append(rows)
        return numbers(wanted)[rows.start : rows.stop]

    store_outputs(str(root), wanted, lambda: predict)
    return asked


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 5)])
def test_stored_outputs_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    wanted = spec(shape=shape)
    assert fill(tmp_path, wanted) == [range(1024), range(1024, 2048), range(2048, 2500)]
    np.testing.assert_array_equal(read_outputs(str(tmp_path), wanted), numbers(wanted))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert fill(tmp_path, wanted) == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_storing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    wanted = spec()

    def stops(rows: range) -> np.ndarray:
        if rows.start == 1024:
            raise KeyboardInterrupt
        return numbers(wanted)[rows.start : rows.stop]

    with pytest.raises(KeyboardInterrupt):
        store_outputs(str(tmp_path), wanted, lambda: stops)
    with pytest.raises(UserError, match="missing"):
        read_outputs(str(tmp_path), wanted)
    assert fill(tmp_path, wanted) == [range(1024, 2048), range(2048, 2500)]
    np.testing.assert_array_equal(read_outputs(str(tmp_path), wanted), numbers(wanted))


def test_a_flipped_bit_anywhere_is_noticed_and_put_right(tmp_path: Path) -> None:
    wanted = spec(rows=40)
    fill(tmp_path, wanted)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".npy")
    files.append(tmp_path / "manifest.json")
    for path in files:
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 20)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError, match="run the same command again"):
                read_outputs(str(tmp_path), wanted)
        fill(tmp_path, wanted)
        np.testing.assert_array_equal(read_outputs(str(tmp_path), wanted), numbers(wanted))


def test_only_a_damaged_file_is_stored_anew(tmp_path: Path) -> None:
    wanted = spec()
    fill(tmp_path, wanted)
    (damaged,) = tmp_path.glob("rows-00001024-*.npy")
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert fill(tmp_path, wanted) == [range(1024, 2048)]
    np.testing.assert_array_equal(read_outputs(str(tmp_path), wanted), numbers(wanted))


def test_outputs_of_another_teacher_are_replaced_and_never_read(tmp_path: Path) -> None:
    fill(tmp_path, spec(teacher="a"))
    with pytest.raises(UserError, match="another teacher"):
        read_outputs(str(tmp_path), spec(teacher="b"))
    assert len(fill(tmp_path, spec(teacher="b"))) == 3


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def predict(rows: range) -> np.ndarray:
        return np.full((len(rows), 3), np.nan, np.float32)

    with pytest.raises(UserError, match="not finite"):
        store_outputs(str(tmp_path), spec(), lambda: predict)
    assert not list(tmp_path.rglob("*.npy"))


def candidates(teacher: str, student: str) -> list[Candidate]:
    return [Candidate("t", teacher), Candidate("s (D)", student, taught_by="t")]


def test_a_taught_student_learns_a_toy_task_and_resumes(
    encoder: str, pooler_free_encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data)
    both, scores = candidates(encoder, pooler_free_encoder), str(tmp_path)
    results = complete(prepare(both, settings, scores), 1)
    assert results["s (D)"]["SST-2"][0]["metrics"]["accuracy"] > 0.95
    assert (tmp_path / "t/SST-2/outputs/manifest.json").exists()
    assert (tmp_path / "t/SST-2/model/config.json").exists()
    assert prepare(both, settings, scores).left == []

    # only the student's run is left: the teacher's outputs are not computed again
    path = tmp_path / "s (D)/SST-2/seed-0.json"
    first = json.loads(path.read_text())
    path.unlink()
    monkeypatch.setattr(outputs_store, "_write", lambda *_: pytest.fail("stored twice"))
    plan = prepare(both, settings, scores)
    assert [job.candidate.name for job, _ in plan.left] == ["s (D)"]
    again = complete(plan, 1)["s (D)"]["SST-2"][0]
    assert again["train"]["loss"] == first["train"]["loss"]


def test_temperature_and_teacher_have_an_effect(
    encoder: str, pooler_free_encoder: str, toy_data: str, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data, epochs=0.3)
    both, scores = candidates(encoder, pooler_free_encoder), str(tmp_path)
    losses = []
    for changed in ({}, {"distillation_temperature": 5.0}):
        now = dataclasses.replace(settings, **changed)
        plan = prepare(both, now, scores)
        assert "s (D)" in {job.candidate.name for job, _ in plan.left}
        losses.append(complete(plan, 1)["s (D)"]["SST-2"][0]["train"]["loss"])
    plain = prepare([Candidate("s", pooler_free_encoder)], settings, scores)
    losses.append(complete(plain, 1)["s"]["SST-2"][0]["train"]["loss"])
    assert len(set(losses)) == 3
    # another teacher: the student's runs are left again
    other = prepare(candidates(pooler_free_encoder, pooler_free_encoder), settings, scores)
    assert {job.candidate.name for job, _ in other.left} == {"t", "s (D)"}


def write_questions(data: Path) -> None:
    """SQuAD's two files with eight questions each."""
    context = "the red car is very bright " * 6
    qas = [
        {"id": str(number), "question": "who ?", "answers": [{"text": "red car", "answer_start": 4}]}
        for number in range(8)
    ]
    for part in ("train", "dev"):
        content = json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]})
        (data / f"{part}-v1.1.json").write_text(content)


def test_spans_and_values_are_taught_too(encoder: str, pooler_free_encoder: str, tmp_path: Path) -> None:
    (tmp_path / "data/STS-B").mkdir(parents=True)
    write_questions(tmp_path / "data")
    for part in ("train", "dev"):
        rows = [f"the film\ta day\t{number % 6}" for number in range(12)]
        (tmp_path / f"data/STS-B/{part}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]))
    settings = dataclasses.replace(
        SETTINGS, tasks=("SQuAD", "STS-B"), data=str(tmp_path / "data"), epochs=1, max_length=16
    )
    scores = str(tmp_path / "scores")
    results = complete(prepare(candidates(encoder, pooler_free_encoder), settings, scores), 1)
    assert results["s (D)"].keys() == {"SQuAD", "STS-B"}
    shapes = [
        json.loads((tmp_path / f"scores/t/{task}/outputs/spec.json").read_text())["shape"]
        for task in ("SQuAD", "STS-B")
    ]
    assert shapes == [[2, 41], [1]]


def test_spans_need_one_vocabulary(encoder: str, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"house"', '"hound"'))
    write_questions(tmp_path)
    settings = dataclasses.replace(SETTINGS, tasks=("SQuAD",), data=str(tmp_path))
    with pytest.raises(UserError, match="different vocabularies"):
        prepare(candidates(encoder, str(other)), settings, str(tmp_path / "scores"))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="distillation_temperature: must be > 0"):
        Evaluation(distillation_temperature=temperature)


def test_the_kl_of_equal_logits_is_zero() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert float(distillation.kl(logits, logits + 3, 2.0)) == pytest.approx(0, abs=1e-6)
