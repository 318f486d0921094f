"""``plan``: time and bytes of a store, and the error of each form in which it can hold the teacher's outputs.

``plan`` reads a few places of the corpus, runs the teacher on some tens of their sequences, and computes the
rest. It prints all results and publishes them as ``runs/<name>/plan/plan.json`` with three plots:

corpus          size and read (in units of ``unit``), places, exact (all of it was read), problems (kind ->
                count); of one masking epoch: tokens, sequences, relative_error (standard error of tokens);
                epochs
kept_mass       ks, temperatures, positions (kind -> how many), masked and unmasked: [T][k]; null where the
                teacher has no masked-LM head
gradient_error  temperature, positions, top_k, student_layers, close_step; at_initialisation and
                close_to_teacher: soft target -> relative error of the head's gradient, see soft_targets.py
                (exact ones of the teacher in the recipe's dtype); null as kept_mass
relation_error  heads; errors: form of hidden states -> relative error of the relations' gradient; null
                where the student starts as its teacher
bytes           form of store -> columns (bytes a token), per_token, total (all masking epochs), top_k,
                hidden_states
step            student -> the arithmetic of a training step, see step_cost.py
time            tokens_per_s of one worker (median of batches) and its settings, hours: workers -> hours; of
                the CPU (device) where the recipe asks for gpus_per_worker and there is no GPU here
recommendation  sentences
seconds         what the plan itself took

A figure that is no finite number is null: every gradient error where the student starts as its teacher.
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
from offline_teacher import preflight
from offline_teacher.corpus.sample import CorpusSample, sample_corpus
from offline_teacher.planning import report as words
from offline_teacher.planning.recommendation import recommend
from offline_teacher.planning.sample import Knowledge, kinds_of_positions, masked_sample, needed
from offline_teacher.planning.soft_targets import compare_targets, kept_mass
from offline_teacher.planning.speed import measure_speed
from offline_teacher.planning.step_cost import step_cost
from offline_teacher.source import find_source, layout_of
from offline_teacher.store.schema import Layout

KS = (8, 16, 32, 64, 128, 256, 512)
TEMPERATURES = (1.0, 2.0, 4.0)
DEFAULT_TOP_K = 64
"""Compared where the recipe keeps no top-k."""


def plan(recipe: Recipe) -> int:
    """Measures, prints and publishes. Raises UserError for the same bad inputs as a run."""
    from offline_teacher.planning import plots

    if recipe.corpus is None or recipe.teacher is None:
        missing = "corpus" if recipe.corpus is None else "teacher"
        raise UserError(f"{missing}: is required to plan a store; this recipe can only use an existing one")
    begin = time.monotonic()
    report = measure(recipe)
    report["seconds"] = round(time.monotonic() - begin, 1)
    directory = storage.join(recipe.root, "plan")
    recipe.save(directory)
    storage.publish_json(storage.join(directory, "plan.json"), report)
    drawn = {name: draw(report) for name, draw in plots.PLOTS.items() if plots.can_draw(name, report)}
    for name, data in drawn.items():
        storage.publish_bytes(storage.join(directory, name), data)
    print(words.text(report, recipe))
    print(f"plan.json and {', '.join(drawn)} are in {directory} ({report['seconds']:.0f} s)")
    return 0


def measure(recipe: Recipe) -> dict[str, Any]:
    """The report, as published."""
    source, recipe = find_source(recipe)
    assert recipe.corpus is not None
    preflight.check_students(recipe, source)
    encoder = source.encoder
    corpus = sample_corpus(recipe.corpus, recipe.sequences, encoder)
    preflight.check_tokens(recipe, encoder, corpus.input_ids, corpus.token_count)
    sequences = masked_sample(recipe, source, encoder, corpus)
    first = sequences.rows(slice(preflight.REHEARSED))
    preflight.rehearse(recipe, source, first.input_ids, first.token_count)
    layout, few = layout_of(recipe, source), sequences.rows(slice(needed(sequences)))
    knowledge = Knowledge(recipe, source, few)
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
        report["relation_error"] = knowledge.relation_error()
    if source.head and layout.positions != "pooled":
        train = compared_train(recipe)
        places = kinds_of_positions(few, train.kl_positions)
        report["kept_mass"] = _kept_mass(recipe, knowledge, places, train)
        report["gradient_error"] = {
            "student_layers": list(knowledge.student_layers),
            **compare_targets(
                knowledge, places["gradient"], _top_k(recipe, layout.vocab_size), train.temperature
            ),
        }
    report = _finite(report)
    return {**report, "recommendation": recommend(report, recipe)}


def compared_train(recipe: Recipe) -> Train:
    """The settings of the first student that learns the teacher's distribution, else of the first."""
    runs = list(recipe.runs().values())
    return next((run.train for run in runs if run.train.alpha_ce), runs[0].train)


def _finite(value: Any) -> Any:
    """The report with None for every number that JSON cannot represent (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _corpus(recipe: Recipe, sample: CorpusSample) -> dict[str, Any]:
    names = ("size", "read", "unit", "places", "tokens", "sequences", "relative_error", "exact")
    return {
        **{name: getattr(sample, name) for name in names},
        "epochs": recipe.masking.epochs,
        "problems": sample.problems.counts,
        "problems_summary": sample.problems.summary(),
    }


def _kept_mass(recipe: Recipe, knowledge: Knowledge, places: dict[str, Any], train: Train) -> dict[str, Any]:
    head = knowledge.head
    ks = sorted({min(k, head.vocab_size) for k in (*KS, _top_k(recipe, head.vocab_size))})
    temperatures = sorted({*TEMPERATURES, *recipe.store.temperatures, train.temperature})
    kinds = {kind: knowledge.last_hidden(places[kind]) for kind in ("masked", "unmasked")}
    return {
        "ks": ks,
        "temperatures": temperatures,
        "positions": {kind: len(states) for kind, states in kinds.items()},
        **{kind: kept_mass(head, states, ks, temperatures).tolist() for kind, states in kinds.items()},
    }


def _top_k(recipe: Recipe, vocab_size: int) -> int:
    return min(recipe.store.top_k or DEFAULT_TOP_K, vocab_size)


def _bytes(recipe: Recipe, own: Layout, sample: CorpusSample) -> dict[str, Any]:
    """Of every form of store: bytes a token by column, and the shards of all masking epochs."""
    forms: dict[str, dict[str, Any]] = {"this recipe": {}}
    if own.positions != "pooled":
        k, plain = _top_k(recipe, own.vocab_size), {"replay_layers": 0}
        best = {"top_k": k, "temperatures": recipe.store.temperatures or (1.0,)}
        forms |= {
            f"top-{k} alone": {**best, **plain, "hidden_states": "none"},
            "int8 hidden states": {**plain, "top_k": 0, "hidden_states": "int8"},
            "float16 hidden states": {**plain, "top_k": 0, "hidden_states": "float16"},
            f"top-{k} and int8": {**best, **plain, "hidden_states": "int8"},
            f"top-{k} and float16": {**best, **plain, "hidden_states": "float16"},
        }
    found, per_token = {}, sample.sequences / sample.tokens
    for name, changes in forms.items():
        layout = replace(own, **changes)
        found[name] = {
            "columns": {column: spec.bytes * per_token for column, spec in layout.columns().items()},
            "per_token": layout.bytes_per_sample() * per_token,
            "total": layout.bytes_per_sample() * sample.sequences * recipe.masking.epochs,
            "top_k": layout.top_k,
            "hidden_states": layout.hidden_states,
        }
    return found
