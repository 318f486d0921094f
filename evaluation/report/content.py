"""Builds the content of ``report.json``, from which every page, table, plot and tracked number is made.

docs/evaluation.md lists its keys. Scores are fractions; times are in seconds, or in ms if a key ends in _ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from evaluation.candidates.models import body_parameters, weight_bytes
from evaluation.candidates.recipe_rows import RANDOM, TEACHER, Rows
from evaluation.devices.latency_table import as_json, latency_part, latency_texts, measure_latency
from evaluation.finetuning.scores import Plan, Results, estimates, macro, medians, read_answers
from evaluation.report.analysis import analyse
from evaluation.report.charts import LOSS_TERMS
from evaluation.report.comparisons import add_comparisons
from evaluation.report.paper import PAPER
from infra.cpu.processor import cpu_name, gpu_names
from infra.settings.recipe import fingerprinted_settings
from infra.settings.sections import Evaluation

KEYS_VERSION = 2
"""Version of the report's keys; a report of another version is built again from the saved scores."""
MILLION = 1_000_000
MAX_POINTS = 200
"""Largest number of points of one curve in the report."""


def machine() -> dict[str, Any]:
    """Returns the hardware and the library versions that timings depend on."""
    return {
        "processor": cpu_name(),
        "gpus": gpu_names(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "transformers")},
    }


def timing_key(settings: Evaluation) -> list[Any]:
    """Returns the settings and the hardware that the timings and costs of a report depend on."""
    latency_settings = (settings.latency_sentences, settings.latency_threads, settings.elmo_reference)
    cost_settings = (settings.price_per_hour, settings.watts)
    return [*latency_settings, *cost_settings, latency_part(settings)[0].name, machine()]


def build(
    title: str,
    settings: Evaluation,
    rows: Rows,
    plan: Plan,
    results: Results,
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Measures latency and returns the content of report.json without ``devices``, ``page`` and ``key``.

    title: the report's title, its key ``recipe``; histories: student -> lines of its training history.
    """
    timed = [model for model in rows.candidates if model.student is None or model.name in rows.students]
    texts, texts_name = latency_texts(settings)
    times, memory, latency_rows = measure_latency(timed, settings, texts)
    by_name: dict[str, dict[str, Any]] = {}
    for model in rows.candidates:
        by_task, student = results[model.name], model.student
        scores = {task: medians(runs) for task, runs in by_task.items()}
        timed_name = student or model.name  # models of one architecture have one latency
        is_student = model.name in (student, f"{student} (D)")
        by_name[model.name] = {
            "student": student,
            "references": rows.references.get(student, {}) if student and is_student else {},
            "scores": scores,
            "seed_scores": {
                task: {str(run["seed"]): run["score"] for run in runs} for task, runs in by_task.items()
            },
            "macro": macro({task: values["score"] for task, values in scores.items()}),
            "parameters": body_parameters(model.directory),
            "bytes": weight_bytes(model.directory),
            "latency": as_json(times[timed_name]),
            "peak_memory": memory[timed_name],
            "cost": cost(times[timed_name].throughput.values(), settings),
        }
    answers = read_answers(plan)
    tasks, mean = estimates(plan, answers)
    add_comparisons(by_name, tasks, mean, {job.task_name: job.task for job in plan.jobs})
    details, disagreements = analyse(plan, answers, TEACHER, list(rows.students))
    all_runs = (run for by_task in results.values() for runs in by_task.values() for run in runs)
    return {
        "recipe": title,
        "students": list(rows.students),
        "seeds": list(settings.seeds),
        "settings": fingerprinted_settings(settings),
        "latency_setting": {
            "texts": texts_name,
            "sentences": len(texts),
            "threads": settings.latency_threads,
            "price_per_hour": settings.price_per_hour,
            "watts": settings.watts,
            **machine(),
        },
        "rows": by_name,
        "latency_rows": {
            name: row | {"cost": cost(row["latency"]["throughput"].values(), settings)}
            for name, row in latency_rows.items()
        },
        "details": details,
        "disagreements": disagreements,
        "curves": {name: curve(lines) for name, lines in histories.items()},
        "notes": list(dict.fromkeys([*rows.notes, *(note for run in all_runs for note in run["notes"])])),
        "paper": PAPER,
    }


def cost(throughputs: Iterable[float], settings: Evaluation) -> dict[str, float | None]:
    """Returns seconds, money and kWh for a million sentences at the fastest batch size.

    throughputs: sentences per second at each batch size.
    """
    seconds = MILLION / max(throughputs)
    price, watts = settings.price_per_hour, settings.watts
    return {
        "seconds": seconds,
        "money": None if price is None else price * seconds / 3600,
        "kwh": None if watts is None else watts * seconds / 3.6e6,
    }


def curve(history: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Returns loss term -> at most ``MAX_POINTS`` [step, value] points, without terms that are always 0."""
    curves = {}
    for term in LOSS_TERMS:
        points = {line["step"]: line[term] for line in history if "step" in line and term in line}
        if any(points.values()):
            ordered = [[step, value] for step, value in sorted(points.items())]
            curves[term] = ordered[:: -(-len(ordered) // MAX_POINTS)]  # the quotient is rounded up
    return curves


def has_gap_closed(report: Mapping[str, Any], name: str) -> bool:
    """Returns whether the report has the teacher and this row's random reference, as ``gap_closed`` needs."""
    return TEACHER in report["rows"] and RANDOM in report["rows"][name]["references"]
