"""The content of a report in the tests: a few models with invented scores, and their comparison."""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluation.measures.intervals import Component, Estimates, mean
from evaluation.report import comparisons
from evaluation.sources.catalogue import TASKS

PNG = b"\x89PNG\r\n\x1a\n"
"""The first bytes of an image."""


def row(cola: float, sst: float, parameters: int, undistilled: str | None = None) -> dict[str, Any]:
    return {
        "student": None if undistilled is None else undistilled.partition(" ")[2] or "student",
        "references": {} if undistilled is None else {"random": undistilled},
        "scores": {"CoLA": {"matthews": cola, "score": cola}, "SST-2": {"accuracy": sst, "score": sst}},
        "seed_scores": {"CoLA": {"0": cola}, "SST-2": {"0": sst}},
        "macro": (cola + sst) / 2,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "latency": {
            "total_seconds": 3.0, "p50_ms": 2.0, "p95_ms": 3.0, "p99_ms": 4.0,
            "throughput": {"8": 9.0, "32": 11.0},
        },
        "peak_memory": 90_000_000,
        "cost": {"seconds": 90_909.1, "money": 2.5, "kwh": None},
    }  # fmt: skip


def estimates(rows: dict[str, dict[str, Any]], error: float = 0.02) -> dict[str, Estimates]:
    """Of every task, each model with an error of its own."""
    component = Component(np.eye(len(rows)) * error**2, 1e9)
    return {
        task: Estimates(np.asarray([row["scores"][task]["score"] for row in rows.values()]), (component,))
        for task in next(iter(rows.values()))["scores"]
    }


def compare(rows: dict[str, dict[str, Any]], error: float = 0.02) -> None:
    tasks = estimates(rows, error)
    comparisons.add_comparisons(rows, tasks, mean(list(tasks.values())), TASKS)


def three_rows() -> dict[str, dict[str, Any]]:
    return {
        "teacher": row(0.4, 0.9, 22_000_000),
        "student": row(0.3, 0.9, 17_000_000, "undistilled"),
        "undistilled": row(0.0, 0.88, 17_000_000),
    }


def family_rows() -> dict[str, dict[str, Any]]:
    """Two students of two shapes and one whose shape is the first one's."""
    return {
        "teacher": row(0.4, 0.9, 22_000_000),
        "half": row(0.3, 0.9, 17_000_000, "undistilled half"),
        "tiny": row(0.2, 0.8, 5_000_000, "undistilled tiny"),
        "other": row(0.36, 0.9, 17_000_000, "undistilled half"),
        "undistilled half": row(0.0, 0.88, 17_000_000),
        "undistilled tiny": row(0.1, 0.7, 5_000_000),
    }


def details(name: str) -> dict[str, Any]:
    labels = {label: {"precision": 0.9, "recall": 0.9, "f1": 0.91, "support": 444.0} for label in "01"}
    sst = {
        "agreement": 0.8, "calibration": {"error": 0.04, "brier": 0.12}, "labels": labels,
        "confusion": [[400, 44], [30, 398]],
    }  # fmt: skip
    return {"CoLA": {"agreement": 0.9}, "SST-2": sst}


def disagreement() -> dict[str, Any]:
    return {
        "example": "7", "text": "not | a <b> film", "label": "1", "teacher": "1 (99 %)",
        "student": "0 (98 %)", "distance": 0.97, "split": "dev",
    }  # fmt: skip


def report_content() -> dict[str, Any]:
    rows = three_rows()
    compare(rows)
    timed = {key: rows["student"][key] for key in ("parameters", "bytes", "latency", "cost")}
    return {
        "latency_rows": {"student ONNX int8": timed},
        "devices": {
            "student": {
                "CoLA": {
                    "score": 0.3, "int8_score": 0.29, "int8_lost": 0.01, "int8_size_ratio": 0.253,
                    "bytes": {"model.onnx": 90_000_000, "model.int8.onnx": 23_000_000},
                    "difference": {"float32": 2e-6, "int8": 0.1},
                }
            }
        },
        "students": ["student"],
        "recipe": "tiny", "seeds": [0, 1, 2], "rows": rows, "notes": ["SST-2 dev: 2 rows"],
        "latency_setting": {
            "texts": "SST-2 dev", "sentences": 872, "threads": 1, "processor": "Abacus 9", "gpus": [],
            "price_per_hour": 0.1, "watts": None,
        },
        "details": {name: details(name) for name in rows},
        "disagreements": {"student": {"SST-2": [disagreement()]}},
        "curves": {"student": {"loss": [[1, 3.0], [2, 2.0]]}},
    }  # fmt: skip
