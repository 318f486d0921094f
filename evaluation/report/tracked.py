"""What the tracking run gets of a report: every number, the headline, files, students with their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.recipe_rows import Rows
from infra.tracking.run import Run

DEVICE_NUMBERS = ("score", "int8_score", "int8_lost", "bytes", "int8_size_ratio", "difference")
"""Of a task's row on devices, those that are numbers or tables of numbers."""
_NO_NUMBERS = ("student", "references", "best_reference")


def track(run: Run, rows: Rows, content: dict[str, Any], files: Sequence[str]) -> None:
    """Logs the report; each student becomes a registered version with its score."""
    run.log_metrics(numbers(content))
    for file in files:
        run.log_artifact(file, "evaluation")
    for one in rows.candidates:
        if one.name not in rows.students:
            continue
        student, row = rows.students[one.name], content["rows"][one.name]
        folder = f"models/{one.name}" if student.recipe.students else "model"
        tags = {"macro": f"{row['macro']:.6f}", "tasks": ",".join(sorted(row["scores"]))}
        run.register_model(
            one.directory, student.registered_name, alias="best", tags=tags, score="macro", folder=folder
        )


def numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """``student/CoLA/matthews``, ``teacher/latency/p50_ms``, ... of the report's rows."""
    found: dict[str, float] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}/{key}" if key != "scores" else prefix, inner)
        elif value is not None:
            found[prefix] = float(value)

    for name, row in (content["rows"] | content["latency_rows"]).items():
        values = {key: value for key, value in row.items() if key not in _NO_NUMBERS}
        collect(_taken(name), values)
    for name, tasks in content["details"].items():
        for task, one in tasks.items():
            collect(_taken(name), {task: {key: one.get(key) for key in ("agreement", "calibration")}})
    for student, tasks in content["devices"].items():
        for task, row in tasks.items():
            collect(f"export/{student}/{task}", {key: row[key] for key in DEVICE_NUMBERS})
    return found


def _taken(name: str) -> str:
    """MLflow takes no brackets."""
    return name.replace("(", "").replace(")", "")
