"""The report of ``plan`` in words: tables, and the recommendation."""

from __future__ import annotations

from typing import Any

import numpy as np

from infra.console import table
from infra.settings.recipe import Recipe

NOTHING = (
    "the dense gradient is zero, so that there is nothing to compare; a student with all layers of its"
    " teacher starts as the teacher"
)


def text(report: dict[str, Any], recipe: Recipe) -> str:
    """The whole report; ``report`` as `plan.measure` gives it."""
    assert recipe.teacher is not None
    sections = (_corpus, _mass, _errors, _relations, _bytes, _step, _time, _recommendation)
    parts = [f"plan of {recipe.name}, teacher {recipe.teacher.model}", *(part(report) for part in sections)]
    return "\n\n".join(part for part in parts if part)


def _corpus(report: dict[str, Any]) -> str:
    corpus = report["corpus"]
    size, read = (amount(corpus[key], corpus["unit"]) for key in ("size", "read"))
    tokens = f"{counted(corpus['tokens'], 'token')}, {counted(corpus['sequences'], 'sequence')}"
    if corpus["exact"]:
        words = f"Corpus: {size}, all of it read: {tokens}"
    else:
        error = corpus["relative_error"]
        within = "" if error is None else f" (standard error {100 * error:.1f} %)"
        words = (
            f"Corpus: {size}, of which {read} in {counted(corpus['places'], 'place')} were read; extrapolated"
            f" from these{within}: about {tokens}"
        )
    epochs = corpus["epochs"]
    if epochs > 1:
        words += f"; x {epochs} masking epochs = {corpus['tokens'] * epochs:,} tokens"
    if corpus["problems_summary"]:
        words += f"\nIn what was read: {corpus['problems_summary']}"
    return words


def _mass(report: dict[str, Any]) -> str:
    mass = report["kept_mass"]
    if mass is None:
        return ""
    rows = [
        [kind, f"{temperature:g}", *("-" if value is None else f"{value:.3f}" for value in values)]
        for kind in ("masked", "unmasked")
        for temperature, values in zip(mass["temperatures"], mass[kind], strict=True)
    ]
    count = mass["positions"]
    kinds = f"{count['masked']:,} masked, {count['unmasked']:,} other positions"
    title = f"Mean probability kept by the top k ({kinds})"
    return title + "\n" + table(rows, ["positions", "T", *(f"k = {k}" for k in mass["ks"])])


def _errors(report: dict[str, Any]) -> str:
    errors = report["gradient_error"]
    if errors is None:
        return ""
    first, close = errors["at_initialisation"], errors["close_to_teacher"]
    rows = [[name, figure(first[name]), figure(close[name])] for name in first]
    layers, step = ", ".join(map(str, errors["student_layers"])), errors["close_step"]
    dtype = report["time"]["dtype"]
    nothing = f"\n-: {NOTHING}" if None in first.values() else ""
    return "\n".join(
        [
            f"Relative error of the student's gradient (MLM head, T = {errors['temperature']:g}, summed over"
            f" {counted(errors['positions'], 'position')}) against the dense teacher in float32; above 1 it"
            " is more wrong than no gradient",
            table(rows, ["soft target", "at initialisation", "close to the teacher"]) + nothing,
            f"at initialisation: the teacher with its layers {layers} alone, and its own head; close:"
            f" {100 * step:g} % of the way from the teacher to there, in hidden states. Exact targets: of"
            f" the teacher in {dtype}, as this recipe runs it",
        ]
    )


def _relations(report: dict[str, Any]) -> str:
    relations = report["relation_error"]
    if relations is None:
        return ""
    rows = [[name, figure(error)] for name, error in relations["errors"].items()]
    heads = counted(relations["heads"], "relation head")
    title = f"Relative error of the gradient of MiniLMv2's relations ({heads}), for a student at its start"
    return title + "\n" + table(rows, ["hidden states", "error"])


def _step(report: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{cost[key] / 1e6:,.1f}" for key in ("student", "vocabulary", "replay", "projections"))]
        for name, cost in report["step"].items()
    ]
    headers = ["student", "its own step", "vocabulary", "replay of one layer", "its Q, K, V alone"]
    title = "Arithmetic of a training step, in millions of operations a token (computed, not measured)"
    return title + "\n" + table(rows, headers)


def _bytes(report: dict[str, Any]) -> str:
    forms = report["bytes"]
    columns = list(dict.fromkeys(column for form in forms.values() for column in form["columns"]))
    rows = [
        [
            name,
            *(f"{form['columns'][column]:.1f}" if column in form["columns"] else "-" for column in columns),
            f"{form['per_token']:,.1f}",
            amount(form["total"], "bytes"),
        ]
        for name, form in forms.items()
    ]
    title = "Bytes a token by column, and the shards of the whole corpus with all masking epochs"
    return (
        title
        + "\n"
        + table(rows, ["", *(column.replace("_", "\n") for column in columns), "bytes\na token", "all"])
    )


def _time(report: dict[str, Any]) -> str:
    time = report["time"]
    rows = [[count, hours(value)] for count, value in time["hours"].items()]
    warning = []
    if without_gpu(time):
        warning.append(
            f"The recipe asks for GPUs (teacher.gpus_per_worker={time['gpus_per_worker']:g}) and there is"
            " none here: speed and hours are of this CPU, and say nothing of a GPU"
        )
    return "\n".join(
        [
            *warning,
            f"One worker here: {time['tokens_per_s']:,.0f} tokens/s (median of"
            f" {counted(time['batches'], 'batch', 'batches')} of {counted(time['batch_size'], 'sequence')},"
            f" {time['dtype']}, {time['device']}, threads: {time['cpu_threads']}; this machine has"
            f" {counted(time['cpus'], 'processor')})",
            table(rows, ["workers", "time"]),
            "for all masking epochs, if every worker is as fast as this one",
        ]
    )


def _recommendation(report: dict[str, Any]) -> str:
    return "Recommendation\n" + "\n".join(f"- {sentence}" for sentence in report["recommendation"])


def without_gpu(time: dict[str, Any]) -> bool:
    """Whether the recipe asks for GPUs and the CPU was measured."""
    return time["gpus_per_worker"] > 0 and time["device"] == "cpu"


# Figures


def counted(count: int, one: str, many: str | None = None) -> str:
    """``1 batch``, ``2 batches``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def figure(value: float | None) -> str:
    """Two significant digits without exponents: 0.00041, 0.12, 5.5, 212; a dash for no number."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    if value < 1e-5:
        return "< 0.00001"
    return np.format_float_positional(float(f"{value:.2g}"), trim="-")


def amount(value: float, unit: str) -> str:
    if unit != "bytes":
        return f"{value:,.0f} {unit}"
    for name in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or name == "TB":
            break
        value /= 1000
    return f"{value:,.0f} {name}" if value >= 100 or name == "bytes" else f"{value:,.1f} {name}"


def hours(value: float) -> str:
    if value >= 48:
        return f"{value:,.0f} h ({value / 24:,.1f} days)"
    if value * 60 < 1:
        return f"{value * 3600:.1f} s"
    return f"{value:.1f} h" if value >= 1 else f"{value * 60:.1f} min"
