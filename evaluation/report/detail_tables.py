"""Tables of what lies behind the scores: differences, agreement, calibration, labels, cost, disagreements.

Each function gives a header and lines of texts, for ``report.md`` and for the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = tuple[list[str], list[list[str]]]


def differences(report: Mapping[str, Any]) -> Table:
    """Every student against the teacher and its references."""
    lines = []
    for name, row in report["rows"].items():
        if row["student"] is None or not row["references"]:
            continue
        for other, found in row["differences"].items():
            ends = found["interval"]
            worse = sum(one["interval"]["high"] < 0 for one in found["by_task"].values())
            better = sum(one["interval"]["low"] > 0 for one in found["by_task"].values())
            interval = f"[{100 * ends['low']:+.1f}, {100 * ends['high']:+.1f}]"
            p = f"{found['p']:.3f}" if found["p"] >= 0.001 else "< 0.001"
            lines.append(
                [name, other, f"{100 * found['difference']:+.1f} {interval}", p, str(better), str(worse)]
            )
    return ["row", "against", "macro, points", "p", "tasks better", "tasks worse"], lines


def agreement(report: Mapping[str, Any]) -> Table:
    """Answers in common with the teacher, percent, a column a task."""
    details = report["details"]
    tasks = list(next(iter(details.values())))
    lines = [
        [name, *(_percent(found[task]["agreement"]) for task in tasks)]
        for name, found in details.items()
        if any(one["agreement"] is not None for one in found.values())
    ]
    return ["row", *tasks], lines


def calibrations(report: Mapping[str, Any]) -> Table:
    """Calibration error in percent and Brier score of every classification."""
    lines = [
        [name, task, _percent(one["calibration"]["error"]), f"{one['calibration']['brier']:.3f}"]
        for name, found in report["details"].items()
        for task, one in found.items()
        if "calibration" in one
    ]
    return ["row", "task", "calibration error", "Brier"], lines


def labels(report: Mapping[str, Any]) -> Table:
    """F1 of every label, percent, a column a model."""
    details = report["details"]
    lines = []
    for task, one in next(iter(details.values())).items():
        for label, values in one.get("labels", {}).items():
            cells = [_percent(details[name][task]["labels"][label]["f1"]) for name in details]
            lines.append([task, label, f"{values['support']:,.0f}", *cells])
    return ["task", "label", "examples", *details], lines


def costs(report: Mapping[str, Any]) -> Table:
    """Of a million sentences at the best throughput, and memory."""
    setting = report["latency_setting"]
    lines = []
    for name, row in (report["rows"] | report["latency_rows"]).items():
        found, memory = row["cost"], row.get("peak_memory")
        cells = [name, f"{1e6 / found['seconds']:,.1f}", f"{found['seconds'] / 3600:,.2f}"]
        cells += [] if setting["price_per_hour"] is None else [f"{found['money']:,.2f}"]
        cells += [] if setting["watts"] is None else [f"{found['kwh']:,.3f}"]
        lines.append([*cells, "" if memory is None else f"{memory / 1e6:,.0f} MB"])
    header = ["model", "sentences/s", "hours a million"]
    header += [] if setting["price_per_hour"] is None else ["price a million"]
    header += [] if setting["watts"] is None else ["kWh a million"]
    return [*header, "peak memory"], lines


def disagreements(report: Mapping[str, Any]) -> Table:
    """Examples on which student and teacher are furthest apart, as text."""
    lines = [
        [student, task, one["example"], one["text"], one["label"], one["teacher"], one["student"]]
        for student, tasks in report["disagreements"].items()
        for task, found in tasks.items()
        for one in found
    ]
    return ["student", "task", "example", "text", "label", "teacher says", "student says"], lines


def cost_note(report: Mapping[str, Any]) -> str:
    """What the costs were computed from."""
    setting = report["latency_setting"]
    price = "" if setting["price_per_hour"] is None else f", {setting['price_per_hour']:g} an hour"
    watts = "" if setting["watts"] is None else f", {setting['watts']:g} W"
    return f"At the best throughput measured on {processor_note(report)}{price}{watts}."


def processor_note(report: Mapping[str, Any]) -> str:
    """The processor of the timings, by name."""
    setting = report["latency_setting"]
    return f"{setting['threads']} thread(s) of {setting['processor']}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
