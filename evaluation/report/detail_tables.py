"""Tables of the details behind the scores: differences, agreement, calibration, labels, cost, disagreements.

The functions return a header and lines of cells for ``report.md`` and ``report.html``; ``report`` is the
content of report.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = tuple[list[str], list[list[str]]]
"""Header, and lines of as many cells; no lines if the report has no such details."""


def differences(report: Mapping[str, Any]) -> Table:
    """Returns one line per student and row with which it is compared: the teacher and its references."""
    lines = []
    for name, row in report["rows"].items():
        if row["student"] is None or not row["references"]:
            continue
        for other, test in row["differences"].items():
            low, high = (100 * test["interval"][end] for end in ("low", "high"))
            worse = sum(one["interval"]["high"] < 0 for one in test["by_task"].values())
            better = sum(one["interval"]["low"] > 0 for one in test["by_task"].values())
            difference = f"{100 * test['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
            p = f"{test['p']:.3f}" if test["p"] >= 0.001 else "< 0.001"
            lines.append([name, other, difference, p, str(better), str(worse)])
    return ["row", "compared with", "macro difference, points", "p", "tasks better", "tasks worse"], lines


def agreement(report: Mapping[str, Any]) -> Table:
    """Returns one line per row of the report and one column per task: agreement with the teacher, percent."""
    details = report["details"]
    tasks = list(next(iter(details.values())))
    lines = [
        [name, *(_percent(by_task[task]["agreement"]) for task in tasks)]
        for name, by_task in details.items()
        if any(detail["agreement"] is not None for detail in by_task.values())
    ]
    return ["row", *tasks], lines


def calibrations(report: Mapping[str, Any]) -> Table:
    """Returns one line per row and classification task: calibration error in percent, Brier score."""
    lines = [
        [name, task, _percent(detail["calibration"]["error"]), f"{detail['calibration']['brier']:.3f}"]
        for name, by_task in report["details"].items()
        for task, detail in by_task.items()
        if "calibration" in detail
    ]
    return ["row", "task", "calibration error", "Brier"], lines


def labels(report: Mapping[str, Any]) -> Table:
    """Returns one line per task and label, and one column per row of the report: F1 in percent."""
    details = report["details"]
    lines = []
    for task, detail in next(iter(details.values())).items():
        for label, values in detail.get("labels", {}).items():
            cells = [_percent(details[name][task]["labels"][label]["f1"]) for name in details]
            lines.append([task, label, f"{values['support']:,.0f}", *cells])
    return ["task", "label", "examples", *details], lines


def costs(report: Mapping[str, Any]) -> Table:
    """Returns time, price and energy per million sentences at the best throughput, and peak memory."""
    setting = report["latency_setting"]
    lines = []
    for name, row in (report["rows"] | report["latency_rows"]).items():
        cost, memory = row["cost"], row.get("peak_memory")
        cells = [name, f"{1e6 / cost['seconds']:,.1f}", f"{cost['seconds'] / 3600:,.2f}"]
        cells += [] if setting["price_per_hour"] is None else [f"{cost['money']:,.2f}"]
        cells += [] if setting["watts"] is None else [f"{cost['kwh']:,.3f}"]
        lines.append([*cells, "" if memory is None else f"{memory / 1e6:,.0f} MB"])
    header = ["model", "sentences/s", "hours per million"]
    header += [] if setting["price_per_hour"] is None else ["price per million"]
    header += [] if setting["watts"] is None else ["kWh per million"]
    return [*header, "peak memory"], lines


def disagreements(report: Mapping[str, Any]) -> Table:
    """Returns one line per example on which a student's and the teacher's answers differ most."""
    keys, lines = ("example", "text", "label", "teacher", "student"), []
    for student, tasks in report["disagreements"].items():
        for task, examples in tasks.items():
            lines += [[student, task, *(one[key] for key in keys)] for one in examples]
    return ["student", "task", "example", "text", "label", "teacher's answer", "student's answer"], lines


def cost_note(report: Mapping[str, Any]) -> str:
    """Returns a sentence with the processor, price and power that the costs are computed from."""
    setting = report["latency_setting"]
    price = "" if setting["price_per_hour"] is None else f", {setting['price_per_hour']:g} per hour"
    watts = "" if setting["watts"] is None else f", {setting['watts']:g} W"
    return f"At the best throughput measured on {processor_note(report)}{price}{watts}."


def processor_note(report: Mapping[str, Any]) -> str:
    """Returns the number of threads and the name of the processor on which latency was measured."""
    setting = report["latency_setting"]
    return f"{setting['threads']} thread(s) of {setting['processor']}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
