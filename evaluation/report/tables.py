"""Writes report.json as tables, for ``report.md`` and the terminal; ``content`` lists its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.candidates.recipe_rows import RANDOM, TEACHER
from evaluation.devices.export_files import FLOAT32, INT8
from evaluation.report import detail_tables
from evaluation.report.content import has_gap_closed
from evaluation.report.paper import PAPER, PAPER_COST
from infra import console


def summary_table(report: Mapping[str, Any]) -> str:
    """Returns an aligned table for the terminal, with an explanation of its numbers.

    With one student, each model is a column and each task a line. With several, each model is a line, and
    the table has no scores of single tasks.
    """
    header, lines = overview_rows(report) if len(report["students"]) > 1 else summary_rows(report)
    return f"{console.table(lines, header)}\n\n{legend(report)}"


def legend(report: Mapping[str, Any]) -> str:
    """Returns an explanation of the numbers in the summary, in lines of at most 110 characters."""
    several = len(report["seeds"]) > 1
    seeds = f"medians of {len(report['seeds'])} seeds" if several else "of one seed"
    over = "examples and seeds" if several else "examples, not over seeds"
    best = "\nGap closed, best: the same with the reference of highest macro score, which is named."
    return (
        f"Scores: percent (labelled test set, else dev), {seeds} [95 % intervals over {over}].\n"
        "Gap closed: (student - undistilled) / (teacher - undistilled); unclear: its interval is unbounded."
        f"{best if has_better_reference(report) else ''}"
    )


def to_markdown(report: Mapping[str, Any], plots: list[str]) -> str:
    """Returns the text of ``report.md``; plots: file names of the images that it shows."""
    latency = report["latency_setting"]
    parts = [
        f"# {report['recipe']}",
        *([markdown_table(*overview_rows(report))] if len(report["students"]) > 1 else []),
        markdown_table(*summary_rows(report)),
        legend(report),
        f"Latency: {latency['texts']}, {latency['sentences']:,} rows at batch size 1, "
        f"{detail_tables.processor_note(report)}, the models taking turns; only the forward pass is timed.",
        "## Every metric",
        markdown_table(*metric_rows(report)),
        *_details(report),
        "## Latency",
        markdown_table(*latency_rows(report)),
        "Models without scores above are only timed; the network of ELMo's size has random weights.",
        "## A million sentences",
        detail_tables.cost_note(report),
        markdown_table(*detail_tables.costs(report)),
    ]
    header, lines = device_rows(report)
    parts += [ON_DEVICES, markdown_table(header, lines)] if lines else []
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots]
    parts += [
        "## For reference: the DistilBERT paper",
        "arXiv 1910.01108, tables 1 to 3: other, larger models than those above, timed on another machine.",
        markdown_table(*paper_rows()),
    ]
    if report["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
    return "\n\n".join(parts) + "\n"


ON_DEVICES = (
    "## On devices\n\nThe student's fine-tuned model of the median seed, exported to "
    "`export/<student>/<task>/`; the int8 score is that model's own, on the same examples."
)
DETAILS = (
    (
        "Paired differences",
        "Difference of the macro scores with its 95 % interval, p of the paired test, and the number of "
        "tasks on which the student is better or worse, with an interval that excludes 0.",
        detail_tables.differences,
    ),
    (
        "Agreement with the teacher",
        "Percent of examples with the teacher's answer (of numbers: the correlation), medians over seeds; "
        "the teacher's own row is the agreement between its seeds.",
        detail_tables.agreement,
    ),
    (
        "Calibration",
        "Expected calibration error in percent (15 bins) and Brier score; 0 is best.",
        detail_tables.calibrations,
    ),
    ("F1 of every label", "F1 in percent, medians over seeds.", detail_tables.labels),
    (
        "Where student and teacher differ most",
        "Each model answers with the seed whose score is the median.",
        detail_tables.disagreements,
    ),
)
"""Title, explanation and table function of each section of details; a section without lines is left out."""


def _details(report: Mapping[str, Any]) -> list[str]:
    parts = []
    for title, explanation, make_table in DETAILS:
        header, lines = make_table(report)
        if lines:
            parts += [f"## {title}", explanation, markdown_table(header, lines)]
    return parts


def summary_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns tasks, macro score, retention and costs as lines; models, then gaps closed, as columns."""
    rows = report["rows"]
    students = [name for name in rows if has_gap_closed(report, name)]
    lines = []
    for task in next(iter(rows.values()))["scores"]:
        scored = [(row["scores"][task], row["intervals"]["scores"][task]) for row in rows.values()]
        cells = [score(one["score"], interval) for one, interval in scored]
        gaps = (_ratio(rows[name], "gap_closed_by_task", task) for name in students)
        lines.append([task, *cells, *gaps])
    cells = [score(row["macro"], row["intervals"]["macro"]) for row in rows.values()]
    lines.append(["macro", *cells, *(_ratio(rows[name], "gap_closed") for name in students)])
    retentions = ["" if name == TEACHER else _ratio(row, "retention") for name, row in rows.items()]
    lines += [["retention", *retentions]] if TEACHER in rows else []
    if has_better_reference(report):
        lines.append(["gap closed, best", *(_best_gap(row) for row in rows.values())])
    lines += _cost_lines(report)
    titles = ["gap closed"] if len(students) == 1 else [f"gap, {name}" for name in students]
    header = ["", *rows, *titles]
    return header, [line + [""] * (len(header) - len(line)) for line in lines]


def overview_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns a table with one line per model: macro score, retention, gap closed and costs."""
    lines, better = [], has_better_reference(report)
    for name, row in report["rows"].items():
        retention = "" if name == TEACHER or TEACHER not in report["rows"] else _ratio(row, "retention")
        gap = _ratio(row, "gap_closed") if has_gap_closed(report, name) else ""
        cells = [name, score(row["macro"], row["intervals"]["macro"]), retention, gap]
        cells += [_best_gap(row)] if better else []
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} MB"
        lines.append([*cells, f"{row['parameters'] / 1e6:.2f} M", size, f"{row['latency']['p50_ms']:.2f} ms"])
    header = ["model", "macro", "retention", "gap closed", *(["gap closed, best"] if better else [])]
    return [*header, "parameters", "size", "p50"], lines


def has_better_reference(report: Mapping[str, Any]) -> bool:
    """Returns whether any student has a reference that scores higher than random weights."""
    rows = report["rows"].values()
    return any(row["best_reference"] != row["references"].get(RANDOM) for row in rows)


def _best_gap(row: Mapping[str, Any]) -> str:
    """Returns the gap closed from the best reference, followed by that reference's name."""
    gap = "" if row["best_reference"] is None else _ratio(row, "gap_closed_best")
    return f"{gap}, {row['best_reference']}" if gap else ""


def _cost_lines(report: Mapping[str, Any]) -> list[list[str]]:
    """Returns the last lines of the summary: parameters, size and latency, one column per model."""
    rows, timed = report["rows"].values(), report["latency_setting"]["texts"]
    sizes = ("" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} MB" for row in rows)
    return [
        ["parameters", *(f"{row['parameters'] / 1e6:.2f} M" for row in rows)],
        ["size", *sizes],
        [f"{timed} pass", *(f"{row['latency']['total_seconds']:.2f} s" for row in rows)],
        ["p50", *(f"{row['latency']['p50_ms']:.2f} ms" for row in rows)],
    ]


def score(value: float, interval: Mapping[str, float]) -> str:
    """Returns a score and its interval in percent, such as ``80.1 [78.0, 82.2]``."""
    return f"{100 * value:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _ratio(row: Mapping[str, Any], name: str, task: str | None = None) -> str:
    """Returns the ratio ``name`` of a row, or of one of its tasks, with its interval in percent."""
    value, interval = row[name], row["intervals"][name]
    if task is not None:
        value, interval = value[task], interval[task]
    if interval is None:
        return "unclear"
    return f"{100 * value:.0f} % [{100 * interval['low']:.0f}, {100 * interval['high']:.0f}]"


def metric_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = list(report["rows"])
    lines = []
    for task, values in report["rows"][names[0]]["scores"].items():
        for metric in values:
            if metric != "score" or len(values) > 2:
                title = "mean" if metric == "score" else metric
                cells = [f"{100 * report['rows'][name]['scores'][task][metric]:.2f}" for name in names]
                lines.append([task, title, *cells])
    return ["task", "metric", *names], lines


def latency_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    batch_sizes = sorted(next(iter(report["rows"].values()))["latency"]["throughput"], key=int)
    lines = []
    for name, row in (report["rows"] | report["latency_rows"]).items():
        times = row["latency"]
        throughputs = [f"{times['throughput'][batch]:.1f}" for batch in batch_sizes]
        percentiles = (f"{times[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} MB"
        count = f"{row['parameters'] / 1e6:.2f} M"
        lines.append([name, count, size, f"{times['total_seconds']:.2f}", *percentiles, *throughputs])
    titles = ["model", "parameters", "size", "full pass s", "p50 ms", "p95 ms", "p99 ms"]
    return titles + [f"sentences/s at batch {batch}" for batch in batch_sizes], lines


def device_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for student, tasks in report["devices"].items():
        for task, row in tasks.items():
            scores = [f"{100 * row[name]:.2f}" for name in ("score", "int8_score", "int8_lost")]
            sizes = [f"{row['bytes'][file] / 1e6:.1f} MB" for file in (FLOAT32, INT8)]
            ratio, error = f"{row['int8_size_ratio']:.3f}", f"{row['difference']['float32']:.1e}"
            lines.append([student, task, *scores, *sizes, ratio, error])
    scores, sizes = ["torch", "int8", "int8 loss"], ["ONNX fp32", "ONNX int8", "size ratio"]
    return ["student", "task", *scores, *sizes, "largest fp32 error"], lines


def paper_rows() -> tuple[list[str], list[list[str]]]:
    columns = list(PAPER["BERT-base"])
    lines = []
    for name, scores in PAPER.items():
        cost = PAPER_COST[name]
        cells = [f"{scores[column]:g}" if column in scores else "" for column in columns]
        seconds = f"{cost['seconds']:.0f} s" if "seconds" in cost else ""
        lines.append([name, *cells, f"{cost['parameters'] / 1e6:.0f} M", seconds])
    return ["model", *columns, "parameters", "STS-B dev pass"], lines


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    divider = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(map(_cell, cells)) + " |" for cells in (header, divider, *lines))


def _cell(text: str) -> str:
    """Returns the text in one line, with the characters escaped that would end a cell or start HTML."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
