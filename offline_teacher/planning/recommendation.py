"""Derives the recommendation of ``plan`` from the numbers of its report."""

from __future__ import annotations

from typing import Any

from infra.settings.recipe import Recipe
from offline_teacher.planning.report import ZERO_GRADIENT, amount, count_noun, hours, lacks_gpu, two_digits
from offline_teacher.planning.soft_targets import exact_name, tail_bucket_name

Errors = dict[str, tuple[float, float]]
"""Soft target -> relative gradient error of the student before training, and of one close to the teacher."""

GOOD = 0.05
"""Largest relative error of a gradient that is recommended as a replacement of the exact gradient."""


def recommend(report: dict[str, Any], recipe: Recipe) -> list[str]:
    """Returns sentences on what to store, the recipe's own choice, replay, dtype and the pass's time. If a
    student's loss needs hidden states, only forms that store hidden states are considered."""
    replay, time = _replay_sentence(report, recipe), _time_sentence(report["time"])
    if recipe.store.positions == "pooled":
        return ["The store keeps one vector per text, which is what sentence encoders are trained on.", time]
    if report["gradient_error"] is None:
        return [*replay, time]
    first, close = (report["gradient_error"][key] for key in ("at_initialisation", "close_to_teacher"))
    if None in first.values():
        return [f"No form of store is recommended: {ZERO_GRADIENT}.", *replay, time]
    needs_hidden = any(run.train.alpha_cos or run.train.alpha_relation for run in recipe.runs().values())
    layers = 1 if benefits_from_replay(recipe) else 0
    errors = {name: (error, close[name]) for name, error in first.items()}
    forms = report["bytes"]
    choices = {form: _target_of(forms[form], layers) for form in forms if form != "this recipe"}
    if needs_hidden:
        choices = {form: target for form, target in choices.items() if forms[form]["hidden_states"] != "none"}
    good = [form for form, target in choices.items() if max(errors[target]) <= GOOD]
    if good:
        best = min(good, key=lambda form: forms[form]["per_token"])
    else:
        best = min(choices, key=lambda form: max(errors[choices[form]]))
    sentences = [_best_sentence(best, choices[best], bool(good), errors, report, needs_hidden)]
    sentences.append(_own_sentence(best, choices[best], errors, report, recipe))
    sentences += replay
    assert recipe.teacher is not None
    float16_error = max(errors[exact_name("float16", layers)])
    if recipe.teacher.dtype != "float32" and float16_error > GOOD:
        sentences.append(
            f"With the teacher in {recipe.teacher.dtype} the gradient errs by up to"
            f" {two_digits(float16_error)} even from float16 hidden states; set teacher.dtype=float32 to"
            " reduce this error."
        )
    return [*sentences, time]


def benefits_from_replay(recipe: Recipe) -> bool:
    """Whether a student of the recipe is trained by relations, which need replayed layers, or is narrower
    than the teacher, so that relations would suit it best."""
    runs = recipe.runs().values()
    return any(run.train.alpha_relation > 0 or run.student.hidden_size is not None for run in runs)


def _replay_sentence(report: dict[str, Any], recipe: Recipe) -> list[str]:
    """Returns a sentence on the benefit and cost of ``store.replay_layers: 1``; none for masked positions."""
    if recipe.store.positions != "all":
        return []
    shares = [cost["replay"] / (cost["student"] + cost["vocabulary"]) for cost in report["step"].values()]
    benefit = "takes the same bytes and also serves relations (MiniLMv2)"
    by_form = (report["relation_error"] or {}).get("errors", {})
    listed = ", ".join(f"{two_digits(error)} ({name})" for name, error in by_form.items())
    errors = f" The error of the relations' gradient is then {listed}." if by_form else ""
    if not benefits_from_replay(recipe):
        return [
            f"Leave store.replay_layers=0 for these students. The value 1 {benefit}, but each step then"
            f" replays a layer, which adds up to {100 * max(shares):.0f} % to the operations of the step."
        ]
    if recipe.store.replay_layers:
        return [f"store.replay_layers={recipe.store.replay_layers} pays here: it {benefit}.{errors}"]
    related = any(run.train.alpha_relation > 0 for run in recipe.runs().values())
    reason = "which the loss of a student uses" if related else "from which narrow students learn best"
    return [f"Set store.replay_layers=1: it {benefit}, {reason}.{errors}"]


def _target_of(form: dict[str, Any], replay_layers: int) -> str:
    """Returns the name of the soft target on which students of a store of this form train."""
    kind = form["hidden_states"]
    if kind != "none":
        return exact_name("float16" if kind == "bfloat16" else kind, replay_layers)
    return tail_bucket_name(form["top_k"])


def _best_sentence(
    best: str, target: str, good: bool, errors: Errors, report: dict[str, Any], needs_hidden: bool
) -> str:
    form = report["bytes"][best]
    bound = f"the gradient within {100 * GOOD:g} % of the exact gradient"
    reason = f"the {'smallest form that' if good else 'most exact form, though none'} keeps {bound}"
    if needs_hidden:
        reason += " and serves every term of the loss" if good else " (the loss needs hidden states)"
    first, close = errors[target]
    settings = f"store.top_k={form['top_k']} store.hidden_states={form['hidden_states']}"
    settings += " store.replay_layers=1" if "input of the last layer" in target else ""
    return (
        f"Store {best} ({settings}): {reason}. Its error is {two_digits(first)} at initialisation and"
        f" {two_digits(close)} close to the teacher. It needs {form['per_token']:,.0f} bytes per token,"
        f" {amount(form['total'], 'bytes')} in all."
    )


def _own_sentence(best: str, best_target: str, errors: Errors, report: dict[str, Any], recipe: Recipe) -> str:
    own, form = report["bytes"]["this recipe"], report["bytes"][best]
    if (own["top_k"], own["hidden_states"]) == (form["top_k"], form["hidden_states"]):
        return "This recipe already stores this form."
    target = _target_of(own, recipe.store.replay_layers)
    size = f"This recipe stores {own['per_token'] / form['per_token']:.2f} times as many bytes"
    if target == best_target:
        return f"{size} for the same soft target: leave out top-{own['top_k']}, which hidden states replace."
    return (
        f"{size} ({amount(own['total'], 'bytes')}); its error is up to"
        f" {two_digits(max(errors[target]))}, that of {best} up to {two_digits(max(errors[best_target]))}."
    )


def _time_sentence(time: dict[str, Any]) -> str:
    count = time["workers"]
    duration = hours(time["hours"][str(count)])
    sentence = f"With {count_noun(count, 'worker')} like this one the pass takes {duration}"
    if count * time["cpu_threads"] > time["cpus"]:
        sentence += ", if each worker has its own processors"
    if lacks_gpu(time):
        sentence += "; the speed was measured on a CPU, not on the GPUs that the recipe asks for"
    return f"{sentence}."
