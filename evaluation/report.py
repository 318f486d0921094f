"""The report: ``report.json`` for programs, ``report.md`` and plots for people.

Keys of report.json (scores are fractions, times seconds unless the name says otherwise):

    recipe               name of the recipe
    seeds                seeds of which every score is the median
    settings             the evaluation section's outcome fields
    latency_setting      texts (their name), sentences, threads, device of the latency pass
    rows.<name>          teacher, student, undistilled, and "student (D)" with a second distillation
      scores.<task>      the task's metrics by name, and "score", their mean
      macro              mean of the task scores (of the GLUE tasks, where there are any)
      retention          macro / the teacher's macro; null for the teacher or where its macro is not positive
      retention_by_task  the same a task
      parameters         number of them, without a task head
      bytes              of the directory's safetensors files; null where there is no such directory
      latency            total_seconds, p50_ms, p95_ms, p99_ms, throughput.<batch size> (sentences/s)
    latency_rows.<name>  rows that are only timed: student ONNX fp32 and int8, ELMo-size (random weights)
      parameters, bytes, latency   as above
    devices.<task>       the student's fine-tuned model of the median seed, exported to export/<task>/
      seed, score        of that model in torch
      int8_score         the same model in int8, on the dev sets; int8_metrics: metric by metric
      int8_lost          score - int8_score
      kind, bytes, int8_size_ratio, difference   as in export.json, see evaluation/export.py
    notes                differences from the official data sets
    paper                the reference rows of arXiv 1910.01108 (percent)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.onnx_model import FLOAT32, INT8
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


def add_retention(rows: dict[str, dict[str, Any]]) -> None:
    """Fill ``retention`` and ``retention_by_task`` of every row from the teacher's."""
    teacher = rows["teacher"]
    for name, row in rows.items():
        is_teacher = name == "teacher"
        row["retention"] = None if is_teacher else _ratio(row["macro"], teacher["macro"])
        row["retention_by_task"] = {
            task: None if is_teacher else _ratio(values["score"], teacher["scores"][task]["score"])
            for task, values in row["scores"].items()
        }


def _ratio(value: float, reference: float) -> float | None:
    return value / reference if reference > 0 else None


def summary_table(report: Mapping[str, Any]) -> str:
    """The rows as an aligned table for the terminal."""
    header, lines = _rows(report)
    return console.table(lines, header)


def to_markdown(report: Mapping[str, Any], plots: list[str]) -> str:
    header, lines = _rows(report)
    latency = report["latency_setting"]
    parts = [
        f"# {report['recipe']}",
        f"Scores are percent, medians of {len(report['seeds'])} seed(s), on the development sets.",
        _markdown_table(header, lines),
        f"Latency: {latency['texts']}, {latency['sentences']:,} rows at batch size 1, "
        f"{latency['threads']} thread(s) on the {latency['device']}, the models taking turns; "
        "only the forward is timed.",
        "## Every metric",
        _markdown_table(*_metric_rows(report)),
        "## Latency",
        _markdown_table(*_latency_rows(report)),
        "Rows without scores above are only timed; a network of ELMo's size has random weights.",
        "## On devices",
        "The student's fine-tuned model of the median seed, exported to `export/<task>/`; the int8 score is "
        "that model's own, on the same development set.",
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


def _rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    tasks = list(next(iter(report["rows"].values()))["scores"])
    timed = report["latency_setting"]["texts"]
    header = ["model", *tasks, "macro", "retention", "parameters", "size", f"{timed} pass", "p50"]
    lines = []
    for name, row in report["rows"].items():
        scores = [f"{100 * row['scores'][task]['score']:.1f}" for task in tasks]
        latency = row["latency"]
        lines.append(
            [
                name, *scores, f"{100 * row['macro']:.1f}",
                "" if row["retention"] is None else f"{100 * row['retention']:.1f} %",
                f"{row['parameters'] / 1e6:.2f} M",
                "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} MB",
                f"{latency['total_seconds']:.2f} s", f"{latency['p50_ms']:.2f} ms",
            ]
        )  # fmt: skip
    return header, lines


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
    for task, row in report["devices"].items():
        sizes, apart = row["bytes"], row["difference"]
        lines.append(
            [
                task, f"{100 * row['score']:.2f}", f"{100 * row['int8_score']:.2f}",
                f"{100 * row['int8_lost']:.2f}", f"{sizes[FLOAT32] / 1e6:.1f} MB",
                f"{sizes[INT8] / 1e6:.1f} MB", f"{row['int8_size_ratio']:.3f}", f"{apart['float32']:.1e}",
            ]
        )  # fmt: skip
    header = ["task", "torch", "int8", "lost", "ONNX fp32", "ONNX int8", "size ratio", "fp32 from torch"]
    return header, lines


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
