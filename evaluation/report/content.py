"""Builds the content of ``report.json``, from which every page, table, plot and tracked number is made.

Keys (scores are fractions; times are in seconds, or in ms if the key ends in _ms):

    recipe               name of the recipe
    students             names of the trained students, in the recipe's order
    seeds                seeds of which every score is the median
    settings             the fields of the recipe's evaluation section that results depend on
    latency_setting      of the timings: texts (name of the dataset), sentences (their number), threads,
                         processor, gpus, versions; price_per_hour and watts as the recipe states them
    rows.<name>          one row per model: teacher, if its weights were found; each student by name
                         ("student" if the recipe has one); "<student> (D)" after a second distillation;
                         the references undistilled and start, followed by the student's name if the recipe
                         has several (students of one shape share a row); other models of the recipe by name
      student            the student that the row belongs to or whose architecture it has; otherwise null
      references         kind (random, start, masked LM alone) -> row with which the student is compared
      best_reference     the reference of highest macro score; null if there are no references
      scores.<task>      the task's metrics by name, and "score", the mean of its main metrics
      seed_scores.<task> the score of each seed
      macro              mean of the task scores (of the GLUE tasks only, if there are any)
      retention          macro / the teacher's macro; null in the teacher's row, without a teacher, or if the
                         teacher's macro is not positive
      gap_closed         (macro - random) / (teacher - random), where random is the macro of the reference
                         with random weights; null if a row is missing or the teacher is not above random
      gap_closed_best    gap_closed with best_reference in place of random
      <ratio>_by_task    retention, gap_closed and gap_closed_best of each task
      differences.<row>  the row's macro score minus that of the teacher or a reference: difference, interval,
                         p of the paired test; by_task.<task> has the same keys
      intervals          low and high bound of the 95 % interval (evaluation/measures/intervals.py) of
                         scores.<task>, macro and every ratio; null if the interval of a ratio is unbounded
      parameters         number of parameters without a task head
      bytes              size of the directory's safetensors files; null if there is no such directory
      latency            total_seconds, p50_ms, p95_ms, p99_ms, throughput.<batch size> (sentences/s)
      peak_memory        bytes of the weights plus the peak of a forward pass with the largest batch
      cost               of a million sentences at the best throughput: seconds, money and kwh (null if the
                         recipe has no price_per_hour or watts)
    latency_rows.<name>  rows that are only timed: <student> ONNX fp32 and int8, <row> GPU, ELMo-size (random
                         weights); parameters, bytes, latency and cost as in rows
    page                 path of the browser page with these models; null if writing it failed; absent if the
                         recipe does not ask for it
    devices.<student>.<task>  the student's fine-tuned model of the median seed, in export/<student>/<task>/
      seed, score        seed of that model, and its score in torch
      int8_score         score of the same model in int8 on the dev sets; int8_metrics has each metric
      int8_lost          score - int8_score
      kind, bytes, int8_size_ratio, difference   as in export.json, see evaluation/devices/export.py
    details.<row>.<task> see evaluation/report/analysis.py
      agreement          share of the teacher's answers that the row gives too (of numbers: the correlation);
                         in the teacher's row, agreement of its fine-tuning seeds with each other
      calibration        of classifications: error (expected calibration error) and brier
      reliability        [examples, confidence, accuracy] of every bin that holds an example
      labels.<label>     precision, recall, f1, support
      confusion          [label][predicted] counts of the median seed
    disagreements.<student>.<task>   examples on which the answers of student and teacher differ most
    curves.<student>     loss term -> [step, value] points of the training
    notes                differences from the official datasets
    paper                the reference rows of arXiv 1910.01108 (percent)
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
from infra.settings.recipe import outcome_settings
from infra.settings.sections import Evaluation

FORM = 2
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

    title: of the report; histories: student -> lines of its training history.
    """
    timed = [one for one in rows.candidates if one.student is None or one.name in rows.students]
    texts, label = latency_texts(settings)
    times, memory, only_timed = measure_latency(timed, settings, texts)
    by_name: dict[str, dict[str, Any]] = {}
    for one in rows.candidates:
        scores = {task: medians(seeds) for task, seeds in results[one.name].items()}
        timed_name = one.student or one.name  # models of one architecture have one latency
        is_student = one.student is not None and one.name in (one.student, f"{one.student} (D)")
        by_name[one.name] = {
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
            "latency": as_json(times[timed_name]),
            "peak_memory": memory[timed_name],
            "cost": cost(times[timed_name].throughput.values(), settings),
        }
    answers = read_answers(plan)
    tasks, mean = estimates(plan, answers)
    add_comparisons(by_name, tasks, mean, {job.task_name: job.task for job in plan.jobs})
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
        "rows": by_name,
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
            curves[term] = ordered[:: -(-len(ordered) // MAX_POINTS)]
    return curves


def has_gap(report: Mapping[str, Any], name: str) -> bool:
    """Returns whether the report has the teacher and, for this row, the reference with random weights."""
    return TEACHER in report["rows"] and RANDOM in report["rows"][name]["references"]
