"""The recommendation of ``plan``, computed from the numbers of its report only."""

from __future__ import annotations

from typing import Any

from infra.settings.recipe import Recipe
from offline_teacher.planning.report import NOTHING, amount, counted, figure, hours, without_gpu
from offline_teacher.planning.soft_targets import exact, renormalised, tail_bucket

Errors = dict[str, tuple[float, float]]
"""Soft target -> relative error of the gradient for a new student, and for one close to the teacher."""

GOOD = 0.05
"""A soft target whose gradient is off by no more than this is as good as the dense teacher for training."""


def recommend(report: dict[str, Any], recipe: Recipe) -> list[str]:
    """Sentences on what to store, the recipe's own choice, replay, dtype, top-k, and the time of the pass.

    If a student's loss needs hidden states, only forms that store them are considered.
    """
    replay, time = _replay_sentence(report, recipe), _time_sentence(report["time"])
    if recipe.store.positions == "pooled":
        return ["One vector a text is kept, which serves students that are sentence encoders.", time]
    if report["gradient_error"] is None:
        return [*replay, time]
    if None in report["gradient_error"]["at_initialisation"].values():
        return [f"No form of store is recommended: {NOTHING}.", *replay, time]
    needs_hidden = any(run.train.alpha_cos or run.train.alpha_relation for run in recipe.runs().values())
    n = 1 if wants_replay(recipe) else 0
    errors = _errors_of(report)
    choices = {form: _target_of(form, report, n) for form in report["bytes"] if form != "this recipe"}
    if needs_hidden:
        choices = {form: target for form, target in choices.items() if _hidden(form, report) != "none"}
    good = [form for form, target in choices.items() if max(errors[target]) <= GOOD]
    if good:
        best = min(good, key=lambda form: report["bytes"][form]["per_token"])
    else:
        best = min(choices, key=lambda form: max(errors[choices[form]]))
    sentences = [_best_sentence(best, choices[best], bool(good), errors, report, needs_hidden)]
    sentences.append(_own_sentence(best, choices[best], errors, report, recipe))
    sentences += replay
    assert recipe.teacher is not None
    least = max(errors[exact("float16", n)])
    if recipe.teacher.dtype != "float32" and least > GOOD:
        sentences.append(
            f"With the teacher in {recipe.teacher.dtype} the gradient errs by up to {figure(least)} even from"
            " float16 hidden states; set teacher.dtype=float32 for less."
        )
    sentences.append(_topk_sentence(report))
    return [*sentences, time]


def wants_replay(recipe: Recipe) -> bool:
    """Whether a student of the recipe uses relations, which need replayed layers, or is narrow, which is best
    taught by relations."""
    runs = recipe.runs().values()
    return any(run.train.alpha_relation > 0 or run.student.hidden_size is not None for run in runs)


def _replay_sentence(report: dict[str, Any], recipe: Recipe) -> list[str]:
    """What ``store.replay_layers: 1`` would bring and cost."""
    if recipe.store.positions != "all":
        return []
    share = 100 * max(
        cost["replay"] / (cost["student"] + cost["vocabulary"]) for cost in report["step"].values()
    )
    same = "takes the same bytes and also serves relations (MiniLMv2)"
    found = (report["relation_error"] or {}).get("errors", {})
    told = ", ".join(f"{figure(error)} ({name})" for name, error in found.items())
    errors = f" Their gradient then errs by {told}." if found else ""
    if not wants_replay(recipe):
        return [
            f"Leave store.replay_layers=0 for these students. The value 1 {same}, but each step then replays"
            f" a layer, which adds up to {share:.0f} % to its arithmetic."
        ]
    if recipe.store.replay_layers:
        return [f"store.replay_layers={recipe.store.replay_layers} pays here: it {same}.{errors}"]
    related = any(run.train.alpha_relation > 0 for run in recipe.runs().values())
    why = "which a student here is trained by" if related else "from which narrow students learn best"
    return [f"Set store.replay_layers=1: it {same}, {why}.{errors}"]


def _errors_of(report: dict[str, Any]) -> Errors:
    errors = report["gradient_error"]
    close = errors["close_to_teacher"]
    return {name: (first, close[name]) for name, first in errors["at_initialisation"].items()}


def _hidden(form: str, report: dict[str, Any]) -> str:
    return str(report["bytes"][form]["hidden_states"])


def _target_of(form: str, report: dict[str, Any], replay_layers: int) -> str:
    """The name of the soft target on which a student trains if the store has this form."""
    kind = _hidden(form, report)
    if kind != "none":
        return exact("float16" if kind == "bfloat16" else kind, replay_layers)
    return tail_bucket(report["bytes"][form]["top_k"])


def _best_sentence(
    best: str, target: str, good: bool, errors: Errors, report: dict[str, Any], needs_hidden: bool
) -> str:
    form = report["bytes"][best]
    bound = f"the gradient within {100 * GOOD:g} % of the dense teacher's"
    why = f"the {'smallest form that' if good else 'most exact form, though none'} keeps {bound}"
    if needs_hidden:
        why += " and serves every term of the loss" if good else " (the loss needs hidden states)"
    first, close = errors[target]
    settings = f"store.top_k={form['top_k']} store.hidden_states={form['hidden_states']}"
    settings += " store.replay_layers=1" if "input of the last layer" in target else ""
    return (
        f"Store {best} ({settings}): {why}. Its error is {figure(first)} at initialisation and"
        f" {figure(close)} close to the teacher, in {form['per_token']:,.0f} bytes a token,"
        f" {amount(form['total'], 'bytes')} in all."
    )


def _own_sentence(best: str, best_target: str, errors: Errors, report: dict[str, Any], recipe: Recipe) -> str:
    own, form = report["bytes"]["this recipe"], report["bytes"][best]
    if (own["top_k"], own["hidden_states"]) == (form["top_k"], form["hidden_states"]):
        return "That is what this recipe stores."
    target = _target_of("this recipe", report, recipe.store.replay_layers)
    words = f"This recipe stores {own['per_token'] / form['per_token']:.2f} times that"
    if target == best_target:
        return f"{words} for the same soft target: leave out top-{own['top_k']}, which hidden states replace."
    return (
        f"{words} ({amount(own['total'], 'bytes')}) for an error of at most {figure(max(errors[target]))},"
        f" against {figure(max(errors[best_target]))}."
    )


def _topk_sentence(report: dict[str, Any]) -> str:
    mass, errors = report["kept_mass"], report["gradient_error"]
    first, close = errors["at_initialisation"], errors["close_to_teacher"]
    k, at = errors["top_k"], mass["temperatures"].index(errors["temperature"])
    kept = mass["masked"][at][mass["ks"].index(k)]
    scaled, bucketed = (max(first[name], close[name]) for name in (renormalised(k), tail_bucket(k)))
    verdict = "do not train on it" if scaled > 1 else "poor" if scaled > GOOD else "good enough here"
    return (
        f"The top {k} keep {100 * kept:.0f} % of the probability at masked positions at"
        f" T = {errors['temperature']:g}: if these are scaled to sum to 1, the gradient errs by up to"
        f" {figure(scaled)} ({verdict}); with the rest as one bucket, by up to {figure(bucketed)}."
    )


def _time_sentence(time: dict[str, Any]) -> str:
    count = time["workers"]
    took = f"With {counted(count, 'worker')} like this one the pass takes {hours(time['hours'][str(count)])}"
    if count * time["cpu_threads"] > time["cpus"]:
        took += ", if each runs on processors of its own"
    if without_gpu(time):
        took += "; this was timed on a CPU, not on the GPUs that the recipe asks for"
    return f"{took}."
