"""Formats the report of ``plan`` (``plan.json``) as text for the terminal: tables and the recommendation."""

from __future__ import annotations

from typing import Any

import numpy as np

from infra.console import table
from infra.settings.recipe import Recipe

ZERO_GRADIENT = (
    "the gradient from the teacher's full distribution is zero, so there is nothing to compare; a student"
    " with all layers of its teacher starts as the teacher"
)


def report_text(report: dict[str, Any], recipe: Recipe) -> str:
    """Returns all sections as one text. ``report``: the result of `plan.measure`."""
    assert recipe.teacher is not None
    sections = (_corpus, _mass, _errors, _relations, _bytes, _step, _time, _recommendation)
    parts = [f"plan of {recipe.name}, teacher {recipe.teacher.model}", *(part(report) for part in sections)]
    return "\n\n".join(part for part in parts if part)


def _corpus(report: dict[str, Any]) -> str:
    corpus = report["corpus"]
    size, read = (amount(corpus[key], corpus["unit"]) for key in ("size", "read"))
    tokens = f"{count_noun(corpus['tokens'], 'token')}, {count_noun(corpus['sequences'], 'sequence')}"
    if corpus["exact"]:
        words = f"Corpus: {size}, all of which was read: {tokens}"
    else:
        error = corpus["relative_error"]
        within = "" if error is None else f" (standard error {100 * error:.1f} %)"
        words = (
            f"Corpus: {size}, of which {read} were read at {count_noun(corpus['places'], 'place')}; estimated"
            f" from them{within}: about {tokens}"
        )
    epochs = corpus["epochs"]
    if epochs > 1:
        words += f"; x {epochs} masking epochs = {corpus['tokens'] * epochs:,} tokens"
    if corpus["problems_summary"]:
        words += f"\nProblems of the text that was read: {corpus['problems_summary']}"
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
    kinds = f"{count['masked']:,} masked, {count['unmasked']:,} unmasked positions"
    title = f"Mean probability of the teacher's top k tokens ({kinds})"
    return title + "\n" + table(rows, ["positions", "T", *(f"k = {k}" for k in mass["ks"])])


def _errors(report: dict[str, Any]) -> str:
    errors = report["gradient_error"]
    if errors is None:
        return ""
    first, close = errors["at_initialisation"], errors["close_to_teacher"]
    rows = [[name, two_digits(first[name]), two_digits(close[name])] for name in first]
    layers, step = ", ".join(map(str, errors["student_layers"])), errors["close_step"]
    dtype = report["time"]["dtype"]
    note = f"\n-: {ZERO_GRADIENT}" if None in first.values() else ""
    lines = [
        f"Relative error of the gradient of the student's MLM head (T = {errors['temperature']:g}, summed"
        f" over {count_noun(errors['positions'], 'position')}) against the gradient from the teacher's"
        " full distribution in float32; an error above 1 is worse than no gradient",
        table(rows, ["soft target", "at initialisation", "close to the teacher"]) + note,
        f"at initialisation: the student has layers {layers} and the head of the teacher; close to the"
        f" teacher: hidden states that differ from the teacher's by {100 * step:g} % of the difference"
        f" at initialisation. Exact targets come from the teacher in {dtype}, as in this recipe",
    ]
    return "\n".join(lines)


def _relations(report: dict[str, Any]) -> str:
    relations = report["relation_error"]
    if relations is None:
        return ""
    rows = [[name, two_digits(error)] for name, error in relations["errors"].items()]
    heads = count_noun(relations["heads"], "relation head")
    title = f"Relative error of the gradient of MiniLMv2's relations ({heads}), before the first step"
    return title + "\n" + table(rows, ["hidden states", "error"])


def _step(report: dict[str, Any]) -> str:
    parts = ("student", "vocabulary", "replay", "projections")
    rows = [[name, *(f"{cost[p] / 1e6:,.1f}" for p in parts)] for name, cost in report["step"].items()]
    headers = ["student", "encoder", "vocabulary", "replay of one layer", "replay of Q, K, V only"]
    title = "Arithmetic of a training step, in millions of operations per token (computed, not measured)"
    return title + "\n" + table(rows, headers)


def _bytes(report: dict[str, Any]) -> str:
    forms = report["bytes"]
    columns = list(dict.fromkeys(column for form in forms.values() for column in form["columns"]))
    rows = []
    for name, form in forms.items():
        own = form["columns"]
        cells = [f"{own[column]:.1f}" if column in own else "-" for column in columns]
        rows.append([name, *cells, f"{form['per_token']:,.1f}", amount(form["total"], "bytes")])
    title = "Bytes per token by column, and bytes of all shards for all masking epochs of the corpus"
    headers = ["", *(column.replace("_", "\n") for column in columns), "bytes per\ntoken", "all"]
    return title + "\n" + table(rows, headers)


def _time(report: dict[str, Any]) -> str:
    time = report["time"]
    rows = [[count, hours(value)] for count, value in time["hours"].items()]
    batches = count_noun(time["batches"], "batch", "batches")
    lines = [
        f"One worker on this machine: {time['tokens_per_s']:,.0f} tokens/s (median of {batches} of"
        f" {count_noun(time['batch_size'], 'sequence')}, {time['dtype']}, {time['device']}, threads:"
        f" {time['cpu_threads']}; this machine has {count_noun(time['cpus'], 'processor')})",
        table(rows, ["workers", "time"]),
        "The times are for all masking epochs, if every worker is as fast as this one",
    ]
    if lacks_gpu(time):
        lines[:0] = [
            f"The recipe asks for GPUs (teacher.gpus_per_worker={time['gpus_per_worker']:g}) and there is"
            " none here: speed and hours are those of this CPU; run plan on a machine with the GPU"
        ]
    return "\n".join(lines)


def _recommendation(report: dict[str, Any]) -> str:
    return "Recommendation\n" + "\n".join(f"- {sentence}" for sentence in report["recommendation"])


def lacks_gpu(time: dict[str, Any]) -> bool:
    """Whether the recipe asks for GPUs but the speed (``time`` of the report) was measured on the CPU."""
    return time["gpus_per_worker"] > 0 and time["device"] == "cpu"


# Formatting of numbers


def count_noun(count: int, singular: str, plural: str | None = None) -> str:
    """Returns the count with its noun: ``1 batch``, ``2 batches``. The default plural ends in s."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def two_digits(value: float | None) -> str:
    """Formats a number >= 0 with two significant digits and no exponent: 0.00041, 0.12, 5.5; None as a dash.

    From 100 on, all digits before the decimal point are shown.
    """
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    if value < 1e-5:
        return "< 0.00001"
    return np.format_float_positional(float(f"{value:.2g}"), trim="-")


def amount(value: float, unit: str) -> str:
    """Formats bytes with a decimal prefix (``3.0 GB``), and any other unit as an integer (``1,200 rows``)."""
    if unit != "bytes":
        return f"{value:,.0f} {unit}"
    for name in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or name == "TB":
            break
        value /= 1000
    return f"{value:,.0f} {name}" if value >= 100 or name == "bytes" else f"{value:,.1f} {name}"


def hours(value: float) -> str:
    """Formats a duration in hours in the unit that suits it: s, min, h, or h and days."""
    if value >= 48:
        return f"{value:,.0f} h ({value / 24:,.1f} days)"
    if value * 60 < 1:
        return f"{value * 3600:.1f} s"
    return f"{value:.1f} h" if value >= 1 else f"{value * 60:.1f} min"
