"""Builds the content of ``report.json``, from which every page, table, plot and tracked number is made.

Keys (scores are 0 to 1; times are in seconds, or in ms where the key ends in _ms):

    recipe               name of the recipe
    students             names of the trained students, in the recipe's order
    seeds                seeds of which every score is the median
    settings             the evaluation section's outcome fields
    latency_setting      texts (name of the data set), sentences (number), threads, processor, gpus and
                         versions of the timings; price_per_hour and watts as the recipe states them
    rows.<name>          teacher, if its weights were found; every student by its name
                         ("student" where the recipe has one); "<student> (D)" after a second distillation;
                         references: undistilled, start (followed by the student's name in a recipe of
                         several; students of one shape share a row); other models by their names in
                         the recipe
      student            the row's student, or the student whose architecture it has; null for other rows
      references         kind -> row with which the student is compared: random, start, masked LM alone
      best_reference     the one of highest macro score; null without any
      scores.<task>      the task's metrics by name, and "score", the mean of those that count
      seed_scores.<task> the score of each seed
      macro              mean of the task scores (of the GLUE tasks, where there are any)
      retention          macro / the teacher's macro; null for the teacher, without one, or where its macro is
                         not positive
      gap_closed         (macro - random) / (teacher - random), random being the row of random weights; null
                         without such rows, or where the teacher is not the better one
      gap_closed_best    the same with best_reference in place of random
      <ratio>_by_task    retention, gap_closed and gap_closed_best, once for each task
      differences.<row>  from the teacher and each reference: difference of the macro scores, interval, p of
                         the paired test; by_task.<task> the same
      intervals          low and high end of the 95 % interval (evaluation/measures/intervals.py) of the value
                         of the same name: scores.<task>, macro, and every ratio; null where the data do not
                         bound a ratio
      parameters         number of them, without a task head
      bytes              of the directory's safetensors files; null where there is no such directory
      latency            total_seconds, p50_ms, p95_ms, p99_ms, throughput.<batch size> (sentences/s)
      peak_memory        bytes of the weights and of the largest batch's forward at its peak
      cost               of a million sentences at the best throughput: seconds, money and kwh (null without
                         a stated price or wattage)
    latency_rows.<name>  rows that are only timed: <student> ONNX fp32 and int8, <row> GPU, ELMo-size (random
                         weights); parameters, bytes, latency, cost as above
    page                 place of the browser page with these models; null if it could not be written; absent
                         if it was not asked for
    devices.<student>.<task>  the student's fine-tuned model of the median seed, in export/<student>/<task>/
      seed, score        of that model in torch
      int8_score         the same model in int8, on the dev sets; int8_metrics: metric by metric
      int8_lost          score - int8_score
      kind, bytes, int8_size_ratio, difference   as in export.json, see evaluation/devices/export.py
    details.<row>.<task> see evaluation/report/analysis.py
      agreement          with the teacher: share of equal answers (of numbers, their correlation); in the
                         teacher's row, of its own fine-tuning seeds with each other
      calibration        error (expected calibration error) and brier; of classifications
      reliability        [examples, confidence, accuracy] of every bin that holds an example
      labels.<label>     precision, recall, f1, support
      confusion          [label][predicted] counts of the median seed
    disagreements.<student>.<task>   examples on which student and teacher are furthest apart
    curves.<student>     step -> each term of the training loss
    notes                differences from the official data sets
    paper                the reference rows of arXiv 1910.01108 (percent)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from evaluation.devices.timed_rows import as_json, latency_part, latency_texts, measure_latency
from evaluation.finetuning.scores import Plan, Results, estimates, macro, medians, read_answers
from evaluation.models import body_parameters, weight_bytes
from evaluation.recipe_rows import RANDOM, TEACHER, Rows
from evaluation.report.analysis import analyse
from evaluation.report.charts import LOSS_TERMS
from evaluation.report.comparisons import add_comparisons
from evaluation.report.paper import PAPER
from infra.cpu.processor import cpu_name, gpu_names
from infra.settings.recipe import outcome_settings
from infra.settings.sections import Evaluation

FORM = 2
"""Version of the report's keys; a report of another version is made again from the saved scores."""
MILLION = 1_000_000
MOST_POINTS = 200
"""The most points of one curve in the report."""


def machine() -> dict[str, Any]:
    """Hardware and versions on which timings depend."""
    return {
        "processor": cpu_name(),
        "gpus": gpu_names(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "transformers")},
    }


def timing_key(settings: Evaluation) -> list[Any]:
    """Settings and hardware on which the timings in a report depend."""
    asked = (settings.latency_sentences, settings.latency_threads, settings.elmo_reference)
    money = (settings.price_per_hour, settings.watts)
    return [*asked, *money, latency_part(settings)[0].name, machine()]


def build(
    title: str,
    settings: Evaluation,
    rows: Rows,
    plan: Plan,
    results: Results,
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """The content of report.json, but for devices and key."""
    timed = [one for one in rows.candidates if one.student is None or one.name in rows.students]
    texts, label = latency_texts(settings)
    times, memory, only_timed = measure_latency(timed, settings, texts)
    found: dict[str, dict[str, Any]] = {}
    for one in rows.candidates:
        scores = {task: medians(seeds) for task, seeds in results[one.name].items()}
        own = one.student or one.name  # one architecture, one latency
        is_student = one.student is not None and one.name in (one.student, f"{one.student} (D)")
        found[one.name] = {
            "student": one.student,
            "references": rows.references.get(one.student or "", {}) if is_student else {},
            "scores": scores,
            "seed_scores": {
                task: {str(run["seed"]): run["score"] for run in seeds}
                for task, seeds in results[one.name].items()
            },
            "macro": macro({task: values["score"] for task, values in scores.items()}),
            "parameters": body_parameters(one.directory),
            "bytes": weight_bytes(one.directory),
            "latency": as_json(times[own]),
            "peak_memory": memory[own],
            "cost": cost(times[own].throughput.values(), settings),
        }
    answers = read_answers(plan)
    tasks, mean = estimates(plan, answers)
    add_comparisons(found, tasks, mean, {job.task_name: job.task for job in plan.jobs})
    details, disagreements = analyse(plan, answers, TEACHER, list(rows.students))
    runs = (run for tasks in results.values() for seeds in tasks.values() for run in seeds)
    return {
        "recipe": title,
        "students": list(rows.students),
        "seeds": list(settings.seeds),
        "settings": outcome_settings(settings),
        "latency_setting": {
            "texts": label,
            "sentences": len(texts),
            "threads": settings.latency_threads,
            "price_per_hour": settings.price_per_hour,
            "watts": settings.watts,
            **machine(),
        },
        "rows": found,
        "latency_rows": {
            name: row | {"cost": cost(row["latency"]["throughput"].values(), settings)}
            for name, row in only_timed.items()
        },
        "details": details,
        "disagreements": disagreements,
        "curves": {name: curve(lines) for name, lines in histories.items()},
        "notes": list(dict.fromkeys([*rows.notes, *(note for run in runs for note in run["notes"])])),
        "paper": PAPER,
    }


def cost(rates: Any, settings: Evaluation) -> dict[str, float | None]:
    """Time, money and energy for a million sentences at the fastest batch size.

    ``rates``: sentences a second at each batch size.
    """
    seconds = MILLION / max(rates)
    price, watts = settings.price_per_hour, settings.watts
    return {
        "seconds": seconds,
        "money": None if price is None else price * seconds / 3600,
        "kwh": None if watts is None else watts * seconds / 3.6e6,
    }


def curve(history: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Term of the loss -> [step, value] points, at most ``MOST_POINTS``; terms that are always 0 are left
    out."""
    found = {}
    for term in LOSS_TERMS:
        points = {line["step"]: line[term] for line in history if "step" in line and term in line}
        if any(points.values()):
            ordered = [[step, value] for step, value in sorted(points.items())]
            found[term] = ordered[:: -(-len(ordered) // MOST_POINTS)]
    return found


def has_gap(report: Mapping[str, Any], name: str) -> bool:
    """Whether the row can be compared with the teacher and with random weights of its shape."""
    return TEACHER in report["rows"] and RANDOM in report["rows"][name]["references"]
