"""Files for GLUE's server, byte by byte, for every test set."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from evaluation.submission import prediction_file, zip_bytes
from evaluation.tasks.catalogue import GLUE, TASKS

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
        "CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI"
    }  # fmt: skip
    parts = {name: part.submission for name, part in TASKS["MNLI"].parts.items() if part.submission}
    assert parts == {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"}


def test_the_same_predictions_are_the_same_zip() -> None:
    files = {"SST-2.tsv": b"index\tprediction\n", "CoLA.tsv": b"x" * 1000}
    data = zip_bytes(files)
    assert data == zip_bytes(dict(reversed(files.items())))
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert archive.namelist() == ["CoLA.tsv", "SST-2.tsv"]
    assert {name: archive.read(name) for name in files} == files
    assert len(data) < 700  # compressed
