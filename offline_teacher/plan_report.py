"""The report of ``plan`` in words: tables, and a recommendation drawn from the measured numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from infra.console import table
from infra.recipe import Recipe
from offline_teacher.soft_target_error import captured, exact, renormalised, tail_bucket

Errors = dict[str, tuple[float, float]]
"""Soft target -> relative error of the gradient: at initialisation, and close to the teacher."""

GOOD = 0.05
"""A soft target whose gradient is off by no more than this is as good as the dense teacher for training."""
NOTHING = (
    "the dense gradient is zero, so that there is nothing to compare; a student with all layers of its"
    " teacher starts as the teacher"
)


def text(report: dict[str, Any], recipe: Recipe) -> str:
    """The whole report; ``report`` as `plan.measure` gives it."""
    sections = (_corpus, _mass, _errors, _bytes, _time, _recommendation)
    return "\n\n".join(
        [f"plan of {recipe.name}, teacher {recipe.teacher.model}", *(part(report) for part in sections)]
    )


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
    replicas = corpus["replicas"]
    if replicas > 1:
        words += f"; x {replicas} replicas = {corpus['tokens'] * replicas:,} tokens"
    if corpus["problems_summary"]:
        words += f"\nIn what was read: {corpus['problems_summary']}"
    return words


def _mass(report: dict[str, Any]) -> str:
    mass = report["kept_mass"]
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
    first, close = errors["at_initialisation"], errors["close_to_teacher"]
    rows = [[name, figure(first[name]), figure(close[name])] for name in first]
    layers, step = ", ".join(map(str, errors["student_layers"])), errors["close_step"]
    nothing = f"\n-: {NOTHING}" if None in first.values() else ""
    return "\n".join(
        [
            f"Relative error of the student's gradient (MLM head, T = {errors['temperature']:g}, summed over"
            f" {counted(errors['positions'], 'position')}) against the dense teacher in float32; above 1 it"
            " is more wrong than no gradient",
            table(rows, ["soft target", "at initialisation", "close to the teacher"]) + nothing,
            f"at initialisation: the teacher with its layers {layers} alone, and its own head; close:"
            f" {100 * step:g} % of the way from the teacher to there, in hidden states. Teacher in float32,"
            " unless another dtype is named",
        ]
    )


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
    title = "Bytes a token by column, and the shards of the whole corpus with all replicas"
    return (
        title
        + "\n"
        + table(rows, ["", *(column.replace("_", "\n") for column in columns), "bytes\na token", "all"])
    )


def _time(report: dict[str, Any]) -> str:
    time = report["time"]
    rows = [[count, hours(value)] for count, value in time["hours"].items()]
    warning = []
    if _without_gpu(time):
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
            "for all replicas, if every worker is as fast as this one",
        ]
    )


def _recommendation(report: dict[str, Any]) -> str:
    return "Recommendation\n" + "\n".join(f"- {sentence}" for sentence in report["recommendation"])


# Recommending


def recommend(report: dict[str, Any], recipe: Recipe) -> list[str]:
    """Sentences: what to store, what this recipe's choice means, what top-k is worth, how long it all takes.

    Every number and every choice comes from ``report``; forms without hidden states are left out where
    the recipe trains with the cosine term.
    """
    if None in report["gradient_error"]["at_initialisation"].values():
        return [f"No form of store is recommended: {NOTHING}.", _time_sentence(report["time"])]
    errors = _judged(report)
    choices = {  # form of store: the soft target it gives
        form: _target_of(form, report) for form in report["bytes"] if form != "this recipe"
    }
    if recipe.train.alpha_cos > 0:  # the cosine term needs hidden states
        choices = {form: target for form, target in choices.items() if _hidden(form, report) != "none"}
    good = [form for form, target in choices.items() if max(errors[target]) <= GOOD]
    if good:
        best = min(good, key=lambda form: report["bytes"][form]["per_token"])
    else:
        best = min(choices, key=lambda form: max(errors[choices[form]]))
    sentences = [_best_sentence(best, choices[best], bool(good), errors, report, recipe)]
    sentences.append(_own_sentence(best, choices[best], errors, report))
    if recipe.teacher.dtype != "float32":
        sentences.append(_dtype_sentence(recipe.teacher.dtype, report))
    sentences.append(_topk_sentence(report))
    return [*sentences, _time_sentence(report["time"])]


def _errors_of(report: dict[str, Any]) -> Errors:
    errors = report["gradient_error"]
    close = errors["close_to_teacher"]
    return {name: (first, close[name]) for name, first in errors["at_initialisation"].items()}


def _judged(report: dict[str, Any]) -> Errors:
    """The errors by which forms of store are compared: of the teacher as the recipe runs it; of one in
    float32 where the recipe's dtype alone is too much, whatever the form."""
    errors = _errors_of(report)
    if not _dtype_is_too_much(report):
        errors |= {target: errors[name] for target, name in report["gradient_error"]["as_captured"].items()}
    return errors


def _dtype_is_too_much(report: dict[str, Any]) -> bool:
    as_captured = report["gradient_error"]["as_captured"]
    return bool(as_captured) and max(_errors_of(report)[as_captured[exact("float16")]]) > GOOD


def _hidden(form: str, report: dict[str, Any]) -> str:
    return str(report["bytes"][form]["hidden_states"])


def _target_of(form: str, report: dict[str, Any]) -> str:
    """The name of the soft target that training takes from this form of store."""
    kind = _hidden(form, report)
    if kind != "none":
        return exact(kind)
    return tail_bucket(report["bytes"][form]["top_k"])


def _best_sentence(
    best: str, target: str, good: bool, errors: Errors, report: dict[str, Any], recipe: Recipe
) -> str:
    form = report["bytes"][best]
    bound = f"the gradient within {100 * GOOD:g} % of the dense teacher's"
    itself = " by itself" if _dtype_is_too_much(report) else ""
    why = f"the {'smallest form that' if good else 'most exact form, though none'}{itself} keeps {bound}"
    if recipe.train.alpha_cos > 0:
        why += " and serves the cosine term" if good else " (the cosine term needs hidden states)"
    first, close = errors[target]
    settings = f"store.top_k={form['top_k']} store.hidden_states={form['hidden_states']}"
    return (
        f"Store {best} ({settings}): {why}. Its error is {figure(first)} at initialisation and"
        f" {figure(close)} close to the teacher, in {form['per_token']:,.0f} bytes a token,"
        f" {amount(form['total'], 'bytes')} in all."
    )


def _own_sentence(best: str, best_target: str, errors: Errors, report: dict[str, Any]) -> str:
    own, form = report["bytes"]["this recipe"], report["bytes"][best]
    if (own["top_k"], own["hidden_states"]) == (form["top_k"], form["hidden_states"]):
        return "That is what this recipe stores."
    target = _target_of("this recipe", report)
    words = f"This recipe stores {own['per_token'] / form['per_token']:.2f} times that"
    if target == best_target:
        return f"{words} for the same soft target: its top-{own['top_k']} is not needed beside hidden states."
    return (
        f"{words} ({amount(own['total'], 'bytes')}) for an error of at most {figure(max(errors[target]))},"
        f" against {figure(max(errors[best_target]))}."
    )


def _dtype_sentence(dtype: str, report: dict[str, Any]) -> str:
    errors = _errors_of(report)
    int8, float16 = (max(errors[captured(kind, dtype)]) for kind in ("int8", "float16"))
    words = (
        f"With the teacher in {dtype}, as this recipe runs it, an exact target is off by up to"
        f" {figure(float16)} from float16 hidden states and {figure(int8)} from int8"
    )
    if not _dtype_is_too_much(report):
        return f"{words}: these are the errors above."
    return (
        f"{words}: more than {100 * GOOD:g} %, whatever is stored. The errors above are of a teacher in"
        " float32; only teacher.dtype=float32 has them."
    )


def _topk_sentence(report: dict[str, Any]) -> str:
    mass, errors = report["kept_mass"], report["gradient_error"]
    first, close = errors["at_initialisation"], errors["close_to_teacher"]
    k, at = errors["top_k"], mass["temperatures"].index(errors["temperature"])
    kept = mass["masked"][at][mass["ks"].index(k)]
    worse, least = (max(first[name], close[name]) for name in (renormalised(k), tail_bucket(k)))
    verdict = "do not train on it" if worse > 1 else "poor" if worse > GOOD else "good enough here"
    return (
        f"The top {k} keep {100 * kept:.0f} % of the probability at masked positions at"
        f" T = {errors['temperature']:g}: renormalised, their gradient is off by up to {figure(worse)}"
        f" ({verdict}); with the exact tail bucket by up to {figure(least)}."
    )


def _time_sentence(time: dict[str, Any]) -> str:
    count = time["workers"]
    took = f"With {counted(count, 'worker')} like this one the pass takes {hours(time['hours'][str(count)])}"
    if count * time["cpu_threads"] > time["cpus"]:
        took += ", if each has processors of its own"
    if _without_gpu(time):
        took += "; on the GPUs that the recipe asks for it was not measured"
    return f"{took}."


def _without_gpu(time: dict[str, Any]) -> bool:
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
