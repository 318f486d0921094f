"""Files for GLUE's server, byte by byte, for every test set."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.candidates.models import Candidate
from evaluation.finetuning.jobs import Job, grid_points
from evaluation.finetuning.scores import Plan
from evaluation.kinds import predictions
from evaluation.measures.model_outputs import Answers
from evaluation.sources.catalogue import GLUE, TASKS
from evaluation.sources.loading import has_part, load
from evaluation.submission import prediction_file, submission_line, write_submission, zip_bytes
from infra.errors import UserError
from infra.settings.sections import Evaluation

CLASSES = {
    "CoLA": ("1", "0"), "SST-2": ("1", "0"), "MRPC": ("1", "0"), "QQP": ("1", "0"), "WNLI": ("1", "0"),
    "QNLI": ("not_entailment", "entailment"), "RTE": ("not_entailment", "entailment"),
    "MNLI": ("neutral", "entailment"),
}  # fmt: skip
"""Task -> what stands for the class ids 1 and 0."""


@pytest.mark.parametrize("name", list(CLASSES))
def test_classes_are_written_as_the_server_reads_them(name: str) -> None:
    second, first = CLASSES[name]
    text = prediction_file(TASKS[name], ["0", "7", "2"], np.asarray([1, 0, 1]))
    assert text == f"index\tprediction\n0\t{second}\n7\t{first}\n2\t{second}\n"


def test_a_third_class_is_written_too() -> None:
    assert prediction_file(TASKS["MNLI"], ["0"], np.asarray([2])) == "index\tprediction\n0\tcontradiction\n"


def test_scores_are_cut_to_the_range_of_the_task() -> None:
    text = prediction_file(TASKS["STS-B"], list("abcd"), np.asarray([-0.5, 5.25, 2.0, 1.23456], np.float32))
    assert text == "index\tprediction\na\t0.000\nb\t5.000\nc\t2.000\nd\t1.235\n"


def test_every_test_set_has_the_servers_file_name() -> None:
    names = {part.submission for name in GLUE for part in TASKS[name].parts.values() if part.submission}
    assert names == {
        "CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX"
    }  # fmt: skip
    parts = {name: part.submission for name, part in TASKS["MNLI"].parts.items() if part.submission}
    assert parts == {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", "test_diagnostic": "AX"}


def test_the_same_predictions_are_the_same_zip() -> None:
    files = {"SST-2.tsv": b"index\tprediction\n", "CoLA.tsv": b"x" * 1000}
    data = zip_bytes(files)
    assert data == zip_bytes(dict(reversed(files.items())))
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert archive.namelist() == ["CoLA.tsv", "SST-2.tsv"]
    assert {name: archive.read(name) for name in files} == files
    assert len(data) < 700  # compressed


def test_an_incomplete_zip_says_what_the_server_wants() -> None:
    files = ["CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "STS-B.tsv", "QQP.tsv", "QNLI.tsv", "RTE.tsv", "WNLI.tsv"]
    mnli = ["MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"]
    assert submission_line("s.zip", files).endswith(
        "WNLI.tsv; gluebenchmark.com also requires " + ", ".join(mnli)
    )
    assert submission_line("s.zip", files + mnli) == f"s.zip: {', '.join(files + mnli)}"
    assert submission_line("s.zip", []) == "s.zip: not written, no test files"


def test_the_diagnostic_set_is_read_beside_the_tasks(tmp_path: Path) -> None:
    (tmp_path / "diagnostic").mkdir()
    (tmp_path / "diagnostic/diagnostic.tsv").write_text(
        "index\tsentence1\tsentence2\n0\tThe cat sat.\tA cat sat.\n7\tIt rains.\tIt is dry.\n"
    )
    task = TASKS["MNLI"]
    assert has_part(task, "test_diagnostic", str(tmp_path))
    assert not has_part(task, "test_matched", str(tmp_path))
    split = load(task, "test_diagnostic", str(tmp_path))
    assert split.texts == [("The cat sat.", "A cat sat."), ("It rains.", "It is dry.")]
    assert split.index == ["0", "7"]
    assert split.labels is None


def test_the_hub_has_the_diagnostic_set_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, ...]] = []
    rows = {"premise": ["a"], "hypothesis": ["b"], "label": [-1], "idx": [4]}

    def load_dataset(*names: str, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((*names, split))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load(TASKS["MNLI"], "test_diagnostic", None).ids == ["4"]
    load(TASKS["MNLI"], "test_matched", None)
    assert asked == [("nyu-mll/glue", "ax", "test"), ("nyu-mll/glue", "mnli", "test_matched")]


SCORES = {0: 0.9, 1: 0.5, 2: 0.7}
"""Seed -> score; seed 2 is the median."""


def finished_plan(directory: Path) -> Plan:
    """Three seeds of two candidates on two tasks. Of MNLI there is one of three test sets, of RTE none. Every
    run predicts another class id, so that a file shows whose predictions it holds."""
    results: dict[Job, dict[str, Any] | None] = {}
    for name in ("student", "teacher"):
        for task, splits in (("MNLI", ["test_matched"]), ("RTE", [])):
            for seed, score in SCORES.items():
                settings = Evaluation()
                job = Job(
                    Candidate(name, "m"), "d", TASKS[task], seed, settings,
                    grid_points(TASKS[task], settings)[0], str(directory),
                )  # fmt: skip
                answer = seed if name == "student" else (seed + 1) % 3
                outputs = np.eye(3, dtype=np.float32)[[answer, 0]]
                found = dict.fromkeys(["dev_matched", *splits], Answers(None, outputs, ["7", "9"]))
                digest = predictions.publish(job.predictions_path, TASKS["MNLI"], found)
                tested = {"test_splits": dict.fromkeys(splits, "digest")} if splits else {}
                results[job] = tested | {
                    "score": score, "dev_score": score, "seed": seed, "predictions": digest
                }  # fmt: skip
    return Plan(list(results), {}, results, {})


def test_a_submission_is_the_median_seeds_predictions(tmp_path: Path) -> None:
    plan, target = finished_plan(tmp_path / "scores"), tmp_path / "s.zip"
    for candidate, label in (("student", "contradiction"), ("teacher", "entailment")):
        assert write_submission(plan, candidate, str(target)) == ["MNLI-m.tsv"]
        with zipfile.ZipFile(target) as archive:
            text = archive.read("MNLI-m.tsv").decode()
        assert text == f"index\tprediction\n7\t{label}\n9\tentailment\n"


def test_no_submission_is_written_without_test_files(tmp_path: Path) -> None:
    plan = finished_plan(tmp_path)
    others = {job: result for job, result in plan.results.items() if job.task_name == "RTE"}
    assert write_submission(Plan(list(others), {}, others, {}), "student", str(tmp_path / "s.zip")) == []
    assert not (tmp_path / "s.zip").exists()


def test_a_submission_of_damaged_predictions_is_refused(tmp_path: Path) -> None:
    plan = finished_plan(tmp_path)
    path = next(job.predictions_path for job in plan.jobs if job.seed == 2)
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    with pytest.raises(UserError, match=r"seed-2\.predictions\.parquet: these predictions are damaged"):
        write_submission(plan, "student", str(tmp_path / "s.zip"))
    assert not (tmp_path / "s.zip").exists()


def test_every_prediction_has_its_index() -> None:
    with pytest.raises(ValueError, match="zip"):
        prediction_file(TASKS["RTE"], ["0"], np.asarray([1, 0]))
