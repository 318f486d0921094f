"""GLUE test predictions in the form that gluebenchmark.com takes: a zip of one .tsv a test set."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.tasks.task import Task


def prediction_file(task: Task, index: Sequence[str], predicted: np.ndarray) -> str:
    """``index<TAB>prediction`` lines under a header: label names, or scores cut to the task's range.

    predicted: class ids [n] or scores [n].
    """
    if task.kind == "regression":
        low, high = map(float, task.labels)
        values = [f"{value:.3f}" for value in np.clip(predicted, low, high)]
    else:
        values = [task.labels[int(value)] for value in predicted]
    lines = ["index\tprediction", *(f"{row}\t{value}" for row, value in zip(index, values, strict=True))]
    return "\n".join(lines) + "\n"


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    """A zip of the named files with a fixed date, so that the same predictions give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
