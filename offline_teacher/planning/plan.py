"""``plan``: estimates time and bytes of a store, and the error of each form of its soft targets.

``plan`` reads a few places of the corpus and runs the teacher on some of their sequences. It prints the
report and publishes it, beside a plot of kept mass, as ``plan.json``; docs/runs.md explains its keys.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from infra.errors import UserError
from infra.files import storage
from infra.settings.recipe import Recipe
from infra.settings.sections import Train
from offline_teacher.inputs.source import find_source, layout_of
from offline_teacher.planning import preflight, teacher_sample
from offline_teacher.planning.recommendation import recommend
from offline_teacher.planning.report import report_text
from offline_teacher.planning.soft_targets import compare_targets, kept_mass
from offline_teacher.planning.speed import measure_speed
from offline_teacher.planning.step_cost import step_cost
from offline_teacher.planning.teacher_sample import SampledTeacher
from offline_teacher.sequences.sample import CorpusSample, sample_corpus
from offline_teacher.store.schema import Layout

KS = (8, 16, 32, 64, 128, 256, 512)
TEMPERATURES = (1.0, 2.0, 4.0)


def plan(recipe: Recipe) -> int:
    """Measures, prints and publishes the report; returns exit code 0."""
    if recipe.corpus is None or recipe.teacher is None:
        missing = "corpus" if recipe.corpus is None else "teacher"
        raise UserError(f"{missing}: is required to plan a store; add this section to the recipe")
    begin = time.monotonic()
    report = measure(recipe)
    report["seconds"] = round(time.monotonic() - begin, 1)
    directory = storage.join(recipe.root, "plan")
    recipe.save(directory)
    storage.publish_json(storage.join(directory, "plan.json"), report)
    if report["kept_mass"] is not None:
        storage.publish_bytes(storage.join(directory, "kept_mass.png"), _plot(report["kept_mass"]))
    print(report_text(report, recipe))
    print(f"plan.json is in {directory} ({report['seconds']:.0f} s)")
    return 0


def _plot(mass: dict[str, Any]) -> bytes:
    from offline_teacher.verification import kept_mass_plot  # matplotlib

    panels = {}
    for kind in ("masked", "unmasked"):
        title = f"{kind} positions ({mass['positions'][kind]:,})"
        panels[title] = dict(zip(mass["temperatures"], mass[kind], strict=True))
    return kept_mass_plot.draw(mass["ks"], panels)


def measure(recipe: Recipe) -> dict[str, Any]:
    """Returns the report without the key ``seconds``."""
    source, recipe = find_source(recipe)
    assert recipe.corpus is not None
    preflight.check_students(recipe, source)
    encoder = source.encoder
    corpus = sample_corpus(recipe.corpus, recipe.sequences, encoder)
    preflight.check_tokens(recipe, encoder, corpus.input_ids, corpus.token_count)
    sequences = teacher_sample.masked_sequences(recipe, source, encoder, corpus)
    first = sequences.rows(slice(preflight.REHEARSED))
    preflight.rehearse(recipe, source, first.input_ids, first.token_count)
    layout = layout_of(recipe, source)
    compared = sequences.rows(slice(teacher_sample.sequences_needed(sequences)))
    outputs = SampledTeacher(recipe, source, compared)
    report: dict[str, Any] = {
        "name": recipe.name,
        "corpus": _corpus(recipe, corpus),
        "kept_mass": None,
        "gradient_error": None,
        "relation_error": None,
        "bytes": _bytes(recipe, layout, corpus),
        "step": step_cost(recipe, source.config, layout),
        "time": measure_speed(recipe, layout, sequences, corpus.tokens * recipe.masking.epochs),
    }
    if layout.positions != "pooled":
        report["relation_error"] = outputs.relation_error()
    if source.head and layout.positions != "pooled":
        runs = list(recipe.runs().values())
        train = next((run.train for run in runs if run.train.alpha_ce), runs[0].train)
        positions = teacher_sample.compared_positions(compared, train.kl_positions)
        report["kept_mass"] = _kept_mass(recipe, outputs, positions, train)
        top_k = _top_k(recipe, layout.vocab_size)
        errors = compare_targets(outputs, positions["gradient"], top_k, train.temperature)
        report["gradient_error"] = {"student_layers": list(outputs.student_layers), **errors}
    report = _finite(report)
    return {**report, "recommendation": recommend(report, recipe)}


def _finite(value: Any) -> Any:
    """Replaces every number that JSON cannot represent (NaN, infinity) by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _corpus(recipe: Recipe, corpus: CorpusSample) -> dict[str, Any]:
    names = ("size", "read", "unit", "places", "tokens", "sequences", "relative_error", "exact")
    own = {name: getattr(corpus, name) for name in names}
    problems = {"problems": corpus.problems.counts, "problems_summary": corpus.problems.summary()}
    return {**own, "epochs": recipe.masking.epochs, **problems}


def _kept_mass(recipe: Recipe, outputs: SampledTeacher, at: dict[str, Any], train: Train) -> dict[str, Any]:
    head = outputs.head
    ks = sorted({min(k, head.vocab_size) for k in (*KS, _top_k(recipe, head.vocab_size))})
    temperatures = sorted({*TEMPERATURES, *recipe.store.temperatures, train.temperature})
    hidden = {kind: outputs.last_hidden(at[kind]) for kind in ("masked", "unmasked")}
    return {
        "ks": ks,
        "temperatures": temperatures,
        "positions": {kind: len(states) for kind, states in hidden.items()},
        **{kind: kept_mass(head, states, ks, temperatures).tolist() for kind, states in hidden.items()},
    }


def _top_k(recipe: Recipe, vocab_size: int) -> int:
    return min(recipe.store.top_k or 64, vocab_size)


def _bytes(recipe: Recipe, own: Layout, corpus: CorpusSample) -> dict[str, Any]:
    """Returns for each form of store its bytes per token by column, and the bytes of its shards."""
    forms: dict[str, dict[str, Any]] = {"this recipe": {}}
    """Name -> fields of the layout that differ from the recipe's."""
    if own.positions != "pooled":
        k, no_replay = _top_k(recipe, own.vocab_size), {"replay_layers": 0}
        top_k = {"top_k": k, "temperatures": recipe.store.temperatures or (1.0,)}
        forms |= {
            f"top-{k} alone": {**top_k, **no_replay, "hidden_states": "none"},
            "int8 hidden states": {**no_replay, "top_k": 0, "hidden_states": "int8"},
            "float16 hidden states": {**no_replay, "top_k": 0, "hidden_states": "float16"},
            f"top-{k} and int8": {**top_k, **no_replay, "hidden_states": "int8"},
            f"top-{k} and float16": {**top_k, **no_replay, "hidden_states": "float16"},
        }
    sizes, per_token = {}, corpus.sequences / corpus.tokens
    for name, changes in forms.items():
        layout = replace(own, **changes)
        sizes[name] = {
            "columns": {column: spec.bytes * per_token for column, spec in layout.columns().items()},
            "per_token": layout.bytes_per_sample() * per_token,
            "total": layout.bytes_per_sample() * corpus.sequences * recipe.masking.epochs,
            "top_k": layout.top_k,
            "hidden_states": layout.hidden_states,
        }
    return sizes
