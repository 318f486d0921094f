from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pyarrow import parquet

from evaluation.candidates.models import Candidate, copy_files, load_model, load_tokenizer
from evaluation.finetuning import finetune, teacher_outputs
from evaluation.finetuning.distillation import distillation_loss
from evaluation.finetuning.jobs import Job, SoftLabels, grid_points
from evaluation.finetuning.scores import complete, prepare
from evaluation.kinds.base import TEACHER_LOGITS, TOKEN_COUNTS, kl
from evaluation.kinds.registry import kind_of
from evaluation.sources.catalogue import find_task
from evaluation.sources.loading import load
from evaluation.tasks.encoded import Encoded
from evaluation.tasks.task import Split
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
    loss = distillation_loss(task, temperature)(
        SimpleNamespace(logits=torch.tensor(student)),
        {"label": torch.tensor(labels), TEACHER_LOGITS: torch.tensor(teacher, dtype=torch.float32)},
    )
    assert float(loss) == pytest.approx(ce + temperature**2 * kl, rel=1e-5)


def test_regression_loss_by_hand() -> None:
    task = find_task("STS-B")
    targets = {"label": torch.tensor([1.0, 2.0]), TEACHER_LOGITS: torch.tensor([[2.0], [2.0]])}
    output = SimpleNamespace(logits=torch.tensor([[3.0], [2.0]]))
    # labels: (4 + 0) / 2, teacher: (1 + 0) / 2, at any temperature
    for temperature in (1.0, 4.0):
        assert float(distillation_loss(task, temperature)(output, targets)) == 2.5


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
        TEACHER_LOGITS: torch.tensor(teacher, dtype=torch.float32),
        TOKEN_COUNTS: torch.tensor(lengths),
    }
    assert float(distillation_loss(task, temperature)(output, targets)) == pytest.approx(expected, rel=1e-5)


TASK = "SST-2"


def taught(encoder: str, root: Path, data: str, digest: str = "a") -> tuple[Job, Split]:
    """A job that learns from ``encoder`` as it is, and the task's training set."""
    task, settings = find_task(TASK), dataclasses.replace(SETTINGS, data=data)
    soft_labels = SoftLabels(encoder, str(root / "train"), digest)
    job = Job(
        Candidate("s", encoder),
        "x",
        task,
        0,
        settings,
        grid_points(task, settings)[0],
        str(root),
        soft_labels=soft_labels,
    )
    return job, load(task, "train", data)


def encoded(job: Job, train: Split) -> Encoded:
    tokenizer = load_tokenizer(job.candidate.directory)
    return kind_of(job.task).encode(tokenizer, job.task, train, job.hyper_parameters.max_length)


def read(job: Job, train: Split) -> np.ndarray:
    assert job.soft_labels is not None
    return teacher_outputs.read_outputs(job.task, train, encoded(job, train), job.soft_labels, "float32")


def forbid_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_outputs, "_predict", lambda *_: pytest.fail("computed twice"))


def test_stored_outputs_are_the_teachers(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, train = taught(encoder, tmp_path, toy_data)
    teacher_outputs.store_outputs(job, train)
    model = load_model(Candidate("t", encoder), job.task, seed=0)
    expected = finetune.answers(model, load_tokenizer(encoder), job.task, train, 16, "float32").outputs
    np.testing.assert_allclose(read(job, train), expected, atol=1e-5)
    rows = parquet.read_table(tmp_path / "train.predictions.parquet").to_pylist()
    assert [rows[3]["split"], rows[3]["row"], len(rows)] == ["train", 3, len(train)]
    forbid_computing(monkeypatch)
    teacher_outputs.store_outputs(job, train)


@pytest.mark.services
def test_a_teacher_may_lie_in_an_object_store(
    encoder: str, toy_data: str, tmp_path: Path, bucket: str
) -> None:
    copy_files(encoder, f"{bucket}/model")
    found = []
    for name, model in (("here", encoder), ("there", f"{bucket}/model")):
        job, train = taught(encoder, tmp_path / name, toy_data)
        assert job.soft_labels is not None
        job = dataclasses.replace(job, soft_labels=dataclasses.replace(job.soft_labels, model=model))
        teacher_outputs.store_outputs(job, train)
        found.append(read(job, train))
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("name", ["train.predictions.parquet", "train.json"])
def test_damage_anywhere_is_noticed_and_put_right(
    name: str, encoder: str, toy_data: str, tmp_path: Path
) -> None:
    job, train = taught(encoder, tmp_path, toy_data)
    teacher_outputs.store_outputs(job, train)
    path, values = tmp_path / name, read(job, train)
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 20)):
        if whole[place : place + 1].isspace():
            continue
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="run the same command again"):
            read(job, train)
    teacher_outputs.store_outputs(job, train)
    np.testing.assert_array_equal(read(job, train), values)


def test_outputs_of_another_teacher_are_replaced_and_never_read(
    encoder: str, toy_data: str, tmp_path: Path
) -> None:
    first, train = taught(encoder, tmp_path, toy_data)
    other, _ = taught(encoder, tmp_path, toy_data, digest="b")
    teacher_outputs.store_outputs(first, train)
    with pytest.raises(UserError, match="another teacher"):
        read(other, train)
    teacher_outputs.store_outputs(other, train)
    assert len(read(other, train)) == len(train)


def test_outputs_that_are_not_finite_are_refused(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, train = taught(encoder, tmp_path, toy_data)
    monkeypatch.setattr(teacher_outputs, "_predict", lambda *_: [np.full(2, np.nan, np.float32)])
    with pytest.raises(UserError, match="not finite"):
        teacher_outputs.store_outputs(job, train)
    assert list(tmp_path.iterdir()) == []


def candidates(teacher: str, student: str) -> list[Candidate]:
    return [Candidate("t", teacher), Candidate("s (D)", student, taught_by="t")]


def test_a_taught_student_learns_a_toy_task_and_resumes(
    encoder: str, pooler_free_encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data)
    both, scores = candidates(encoder, pooler_free_encoder), str(tmp_path)
    results = complete(prepare(both, settings, scores), 1)
    assert results["s (D)"]["SST-2"][0]["metrics"]["accuracy"] > 0.95
    assert (tmp_path / "t/SST-2/train.predictions.parquet").exists()
    assert (tmp_path / "t/SST-2/model/config.json").exists()
    assert prepare(both, settings, scores).unfinished == []

    # only the student's run is left: the teacher's outputs are not computed again
    path = tmp_path / "s (D)/SST-2/seed-0.json"
    first = json.loads(path.read_text())
    path.unlink()
    forbid_computing(monkeypatch)
    plan = prepare(both, settings, scores)
    assert [job.candidate.name for job, _ in plan.unfinished] == ["s (D)"]
    again = complete(plan, 1)["s (D)"]["SST-2"][0]
    assert again["train"]["loss"] == first["train"]["loss"]


def test_temperature_and_teacher_have_an_effect(
    encoder: str, pooler_free_encoder: str, toy_data: str, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data, epochs=0.3)
    both, scores = candidates(encoder, pooler_free_encoder), str(tmp_path)
    losses = []
    for now in (settings, dataclasses.replace(settings, distillation_temperature=5.0)):
        plan = prepare(both, now, scores)
        assert "s (D)" in {job.candidate.name for job, _ in plan.unfinished}
        losses.append(complete(plan, 1)["s (D)"]["SST-2"][0]["train"]["loss"])
    plain = prepare([Candidate("s", pooler_free_encoder)], settings, scores)
    losses.append(complete(plain, 1)["s"]["SST-2"][0]["train"]["loss"])
    assert len(set(losses)) == 3
    # another teacher: the student's runs are left again
    other = prepare(candidates(pooler_free_encoder, pooler_free_encoder), settings, scores)
    assert {job.candidate.name for job, _ in other.unfinished} == {"t", "s (D)"}


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
    stored = {
        task: parquet.read_table(tmp_path / f"scores/t/{task}/train.predictions.parquet")[
            "output"
        ].to_pylist()
        for task in ("SQuAD", "STS-B")
    }
    assert {len(row) for row in stored["STS-B"]} == {1}
    assert {len(row) for row in stored["SQuAD"]} == {2 * 41}  # start and end of 41 tokens


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
    assert float(kl(logits, logits + 3, 2.0)) == pytest.approx(0, abs=1e-6)
