"""The report: ``report.json`` for programs, ``report.md`` and plots for people.

Keys of report.json (scores are fractions, times seconds unless the name says otherwise):

    recipe               name of the recipe
    students             names of the trained students, in the recipe's order
    seeds                seeds of which every score is the median
    settings             the evaluation section's outcome fields
    latency_setting      texts (their name), sentences, threads, device of the latency pass
    rows.<name>          teacher, if its weights were found; every student by its name
                         ("student" where the recipe has one); "<student> (D)" after a second distillation;
                         undistilled ("undistilled <student>" of several, one row for students of one shape)
      student            the student that the row is, or has the architecture of; null for the teacher
      undistilled        the row of its architecture with random weights; null without
      scores.<task>      the task's metrics by name, and "score", their mean
      seed_scores.<task> the score of each seed
      macro              mean of the task scores (of the GLUE tasks, where there are any)
      retention          macro / the teacher's macro; null for the teacher, without one, or where its macro is
                         not positive
      retention_by_task  the same a task
      gap_closed         (macro - undistilled) / (teacher - undistilled); null for these two rows, without one
                         of them, or where the teacher is not the better one
      gap_closed_by_task the same a task
      intervals          low and high end of the 95 % interval (evaluation/measures/intervals.py) of the value
                         of the same name: scores.<task>, macro, retention, retention_by_task.<task>,
                         gap_closed, gap_closed_by_task.<task>; null where the data do not bound a ratio
      parameters         number of them, without a task head
      bytes              of the directory's safetensors files; null where there is no such directory
      latency            total_seconds, p50_ms, p95_ms, p99_ms, throughput.<batch size> (sentences/s)
    latency_rows.<name>  rows that are only timed: <student> ONNX fp32 and int8, ELMo-size (random weights)
      parameters, bytes, latency   as above
    devices.<student>.<task>  the student's fine-tuned model of the median seed, in export/<student>/<task>/
      seed, score        of that model in torch
      int8_score         the same model in int8, on the dev sets; int8_metrics: metric by metric
      int8_lost          score - int8_score
      kind, bytes, int8_size_ratio, difference   as in export.json, see evaluation/devices/export.py
    notes                differences from the official data sets
    paper                the reference rows of arXiv 1910.01108 (percent)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation.devices.exported import FLOAT32, INT8
from evaluation.measures import intervals
from evaluation.measures.intervals import Estimates, Ratio
from evaluation.recipe_rows import TEACHER
from evaluation.tasks.catalogue import find_task
from infra import console

PAPER: dict[str, dict[str, float]] = {
    "ELMo": {
        "macro": 68.7, "CoLA": 44.1, "MNLI": 68.6, "MRPC": 76.6, "QNLI": 71.1, "QQP": 86.2, "RTE": 53.4,
        "SST-2": 91.5, "STS-B": 70.4, "WNLI": 56.3,
    },
    "BERT-base": {
        "macro": 79.5, "CoLA": 56.3, "MNLI": 86.7, "MRPC": 88.6, "QNLI": 91.8, "QQP": 89.6, "RTE": 69.3,
        "SST-2": 92.7, "STS-B": 89.0, "WNLI": 53.5, "IMDb": 93.46, "SQuAD EM": 81.2, "SQuAD F1": 88.5,
    },
    "DistilBERT": {
        "macro": 77.0, "CoLA": 51.3, "MNLI": 82.2, "MRPC": 87.5, "QNLI": 89.2, "QQP": 88.5, "RTE": 59.9,
        "SST-2": 91.3, "STS-B": 86.9, "WNLI": 56.3, "IMDb": 92.82, "SQuAD EM": 77.7, "SQuAD F1": 85.8,
    },
}  # fmt: skip
"""Tables 1 and 2 of arXiv 1910.01108, development sets, medians of 5 runs, percent."""
PAPER_COST = {
    "ELMo": {"parameters": 180e6, "seconds": 895.0},
    "BERT-base": {"parameters": 110e6, "seconds": 668.0},
    "DistilBERT": {"parameters": 66e6, "seconds": 410.0},
}
"""Table 3 of the same: a full STS-B dev pass, CPU, batch size 1."""


def add_comparisons(
    rows: dict[str, dict[str, Any]], tasks: Mapping[str, Estimates], macro: Estimates
) -> None:
    """Fill retention, gap closed and intervals of every row. The estimates' models are in the rows' order."""
    names = list(rows)
    for place, (name, row) in enumerate(rows.items()):
        row["intervals"] = {
            "scores": {task: _score_ends(one, place, _least(task)) for task, one in tasks.items()},
            "macro": _score_ends(macro, place, -1.0),
        }
        for measure, compare in (("retention", _retention), ("gap_closed", _gap_closed)):
            ratios = {task: _parts(compare(one, names, name, row)) for task, one in tasks.items()}
            row[measure], row["intervals"][measure] = _parts(compare(macro, names, name, row))
            row[f"{measure}_by_task"] = {task: value for task, (value, _) in ratios.items()}
            row["intervals"][f"{measure}_by_task"] = {task: ends for task, (_, ends) in ratios.items()}


def _score_ends(estimates: Estimates, place: int, least: float) -> dict[str, float]:
    """Of a score, which is in [least, 1]."""
    low, high = intervals.interval(estimates, np.eye(len(estimates.scores))[place])
    return {"low": max(low, least), "high": min(high, 1.0)}


def _least(task: str) -> float:
    """The least value of a task's score: correlations can be negative, shares cannot."""
    return -1.0 if {"matthews", "pearson", "spearman"} & set(find_task(task).metrics) else 0.0


def _retention(estimates: Estimates, names: list[str], name: str, row: Mapping[str, Any]) -> Ratio | None:
    if name == TEACHER or TEACHER not in names:
        return None
    return intervals.retention(estimates, names.index(name), names.index(TEACHER))


def _gap_closed(estimates: Estimates, names: list[str], name: str, row: Mapping[str, Any]) -> Ratio | None:
    if TEACHER not in names or row["undistilled"] is None:
        return None
    return intervals.gap_closed(estimates, *map(names.index, (name, row["undistilled"], TEACHER)))


def _parts(ratio: Ratio | None) -> tuple[float | None, dict[str, float] | None]:
    """Its value and its interval for report.json."""
    if ratio is None:
        return None, None
    return ratio.value, ratio.interval and dict(zip(("low", "high"), ratio.interval, strict=True))


def summary_table(report: Mapping[str, Any]) -> str:
    """The rows as an aligned table for the terminal, and an explanation of its numbers.

    With one student each model is a column with all tasks; with several each model is a line without tasks.
    """
    header, lines = _overview_rows(report) if len(report["students"]) > 1 else _summary_rows(report)
    return f"{console.table(lines, header)}\n\n{_legend(report)}"


def _legend(report: Mapping[str, Any]) -> str:
    """What the numbers of the summary are; two lines of at most 110 characters."""
    several = len(report["seeds"]) > 1
    seeds = f"medians of {len(report['seeds'])} seeds" if several else "of one seed"
    over = "examples and seeds" if several else "examples, not over seeds"
    return (
        f"Scores: percent on the development sets, {seeds} [95 % intervals over {over}].\n"
        "Gap closed: (student - undistilled) / (teacher - undistilled); unclear: the data do not bound it."
    )


def to_markdown(report: Mapping[str, Any], plots: list[str]) -> str:
    latency = report["latency_setting"]
    parts = [
        f"# {report['recipe']}",
        *([_markdown_table(*_overview_rows(report))] if len(report["students"]) > 1 else []),
        _markdown_table(*_summary_rows(report)),
        _legend(report),
        f"Latency: {latency['texts']}, {latency['sentences']:,} rows at batch size 1, "
        f"{latency['threads']} thread(s) on the {latency['device']}, the models taking turns; "
        "only the forward is timed.",
        "## Every metric",
        _markdown_table(*_metric_rows(report)),
        "## Latency",
        _markdown_table(*_latency_rows(report)),
        "Rows without scores above are only timed; a network of ELMo's size has random weights.",
        "## On devices",
        "The student's fine-tuned model of the median seed, exported to `export/<student>/<task>/`; the int8 "
        "score is that model's own, on the same development set.",
        _markdown_table(*_device_rows(report)),
    ]
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots]
    parts += [
        "## For reference: the DistilBERT paper",
        "arXiv 1910.01108, tables 1 to 3: other and larger models than these rows, on their machine.",
        _markdown_table(*_paper_rows()),
    ]
    if report["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
    return "\n\n".join(parts) + "\n"


def _summary_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One line per task, then macro score, retention and costs. One column per model, then the gap closed."""
    rows = report["rows"]
    students = [name for name in rows if _has_gap(report, name)]
    lines = []
    for task in next(iter(rows.values()))["scores"]:
        cells = [
            _score(row["scores"][task]["score"], row["intervals"]["scores"][task]) for row in rows.values()
        ]
        gaps = (_share(rows[name], "gap_closed_by_task", task) for name in students)
        lines.append([task, *cells, *gaps])
    cells = [_score(row["macro"], row["intervals"]["macro"]) for row in rows.values()]
    lines.append(["macro", *cells, *(_share(rows[name], "gap_closed") for name in students)])
    kept = ["" if name == TEACHER else _share(row, "retention") for name, row in rows.items()]
    lines += [["retention", *kept]] if TEACHER in rows else []
    lines += _cost_lines(report)
    titles = ["gap closed"] if len(students) == 1 else [f"gap, {name}" for name in students]
    header = ["", *rows, *titles]
    return header, [line + [""] * (len(header) - len(line)) for line in lines]


def _has_gap(report: Mapping[str, Any], name: str) -> bool:
    """Whether the row can be compared with the teacher and with its own undistilled form."""
    return TEACHER in report["rows"] and report["rows"][name]["undistilled"] is not None


def _overview_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A line a model: macro score, retention, gap closed and costs."""
    lines = []
    for name, row in report["rows"].items():
        kept = "" if name == TEACHER or TEACHER not in report["rows"] else _share(row, "retention")
        gap = _share(row, "gap_closed") if _has_gap(report, name) else ""
        cells = [name, _score(row["macro"], row["intervals"]["macro"]), kept, gap]
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} MB"
        lines.append([*cells, f"{row['parameters'] / 1e6:.2f} M", size, f"{row['latency']['p50_ms']:.2f} ms"])
    return ["model", "macro", "retention", "gap closed", "parameters", "size", "p50"], lines


def _cost_lines(report: Mapping[str, Any]) -> list[list[str]]:
    rows, timed = report["rows"].values(), report["latency_setting"]["texts"]
    sizes = ("" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} MB" for row in rows)
    return [
        ["parameters", *(f"{row['parameters'] / 1e6:.2f} M" for row in rows)],
        ["size", *sizes],
        [f"{timed} pass", *(f"{row['latency']['total_seconds']:.2f} s" for row in rows)],
        ["p50", *(f"{row['latency']['p50_ms']:.2f} ms" for row in rows)],
    ]


def _score(value: float, interval: Mapping[str, float]) -> str:
    return f"{100 * value:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _share(row: Mapping[str, Any], name: str, task: str | None = None) -> str:
    """A ratio of the row, or of one of its tasks, in percent."""
    value, interval = row[name], row["intervals"][name]
    if task is not None:
        value, interval = value[task], interval[task]
    if interval is None:
        return "unclear"
    return f"{100 * value:.0f} % [{100 * interval['low']:.0f}, {100 * interval['high']:.0f}]"


def _metric_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = list(report["rows"])
    lines = []
    for task, values in report["rows"][names[0]]["scores"].items():
        for metric in values:
            if metric != "score" or len(values) > 2:
                shown = "mean" if metric == "score" else metric
                cells = [f"{100 * report['rows'][name]['scores'][task][metric]:.2f}" for name in names]
                lines.append([task, shown, *cells])
    return ["task", "metric", *names], lines


def _latency_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    sizes = sorted(next(iter(report["rows"].values()))["latency"]["throughput"], key=int)
    lines = []
    for name, row in (report["rows"] | report["latency_rows"]).items():
        times = row["latency"]
        rates = [f"{times['throughput'][size]:.1f}" for size in sizes]
        percentiles = (f"{times[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} MB"
        count = f"{row['parameters'] / 1e6:.2f} M"
        lines.append([name, count, size, f"{times['total_seconds']:.2f}", *percentiles, *rates])
    titles = ["model", "parameters", "size", "full pass s", "p50 ms", "p95 ms", "p99 ms"]
    return titles + [f"sentences/s at batch {size}" for size in sizes], lines


def _device_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for student, task, row in (
        (student, task, row) for student, tasks in report["devices"].items() for task, row in tasks.items()
    ):
        sizes, apart = row["bytes"], row["difference"]
        lines.append(
            [
                student, task, f"{100 * row['score']:.2f}", f"{100 * row['int8_score']:.2f}",
                f"{100 * row['int8_lost']:.2f}", f"{sizes[FLOAT32] / 1e6:.1f} MB",
                f"{sizes[INT8] / 1e6:.1f} MB", f"{row['int8_size_ratio']:.3f}", f"{apart['float32']:.1e}",
            ]
        )  # fmt: skip
    scores, sizes = ["torch", "int8", "lost"], ["ONNX fp32", "ONNX int8", "size ratio"]
    return ["student", "task", *scores, *sizes, "fp32 from torch"], lines


def _paper_rows() -> tuple[list[str], list[list[str]]]:
    columns = list(PAPER["BERT-base"])
    lines = []
    for name, scores in PAPER.items():
        cost = PAPER_COST[name]
        cells = [f"{scores[column]:g}" if column in scores else "" for column in columns]
        lines.append([name, *cells, f"{cost['parameters'] / 1e6:.0f} M", f"{cost['seconds']:.0f} s"])
    return ["model", *columns, "parameters", "STS-B dev pass"], lines


def _markdown_table(header: list[str], lines: list[list[str]]) -> str:
    divider = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, divider, *lines))
