"""``plan``: what a store would cost, keep, and how wrong each soft target would be, before it is paid for.

A few places of the corpus are read, the teacher runs on some tens of their sequences, and the rest is
arithmetic. Everything is printed, and published as ``runs/<name>/plan/plan.json`` with three plots:

corpus          size and read (in units of ``unit``), places, exact (all of it was read), problems (kind ->
                count); of one replica: tokens, sequences, relative_error (standard error of tokens); replicas
kept_mass       ks, temperatures, positions (kind -> how many), masked and unmasked: [T][k]
gradient_error  temperature, positions, top_k, student_layers, close_step; at_initialisation and
                close_to_teacher: soft target -> relative error of the head's gradient, see
                soft_target_error.py; as_captured: exact soft target (of the teacher in float32, like all
                others) -> the same of the teacher in the recipe's dtype; empty where that is float32
bytes           form of store -> columns (bytes a token), per_token, total (all replicas), top_k,
                hidden_states
time            tokens_per_s of one worker (median of batches) and its settings, hours: workers -> hours; of
                the CPU (device) where the recipe asks for gpus_per_worker and there is no GPU here
recommendation  sentences
seconds         what the plan itself took

A figure that is no finite number is null: every gradient error where the student starts as its teacher.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra import storage
from infra.recipe import Recipe
from offline_teacher import plan_plots, plan_report, preflight
from offline_teacher.capture import Capture
from offline_teacher.corpus_sample import CorpusSample, sample_corpus
from offline_teacher.masking import MaskVocab, mask_sequences, mask_vocab
from offline_teacher.packing import Encoder
from offline_teacher.soft_target_error import (
    DenseHead,
    compare_targets,
    kept_mass,
    only_layers,
    student_layers,
)
from offline_teacher.source import Source, find_source, layout_of
from offline_teacher.store.schema import Layout
from offline_teacher.teacher import LoadedTeacher, load_teacher

KS = (8, 16, 32, 64, 128, 256, 512)
TEMPERATURES = (1.0, 2.0, 4.0)
DEFAULT_TOP_K = 64
"""Compared where the recipe keeps no top-k."""
MASS_POSITIONS = 1024
"""Of each kind, masked and unmasked."""
GRADIENT_POSITIONS = 512
SAMPLE_TOKENS = 1 << 14
"""At most this many run through the teacher in float32."""
SPEED_BATCHES = (3, 8)
SPEED_SECONDS = 12.0
"""Batches timed: at least three, then until eight or this long."""
WORKERS = (1, 8, 64)


@dataclass(frozen=True)
class Sequences:
    """Masked sequences of the sample, in random order: what run through the teacher would be."""

    input_ids: np.ndarray
    """[n, L]"""
    positions: np.ndarray
    """[n, M] the masked ones; -1: unused."""
    token_count: np.ndarray
    """[n]"""

    def rows(self, chosen: Any) -> Sequences:
        return Sequences(self.input_ids[chosen], self.positions[chosen], self.token_count[chosen])


def plan(recipe: Recipe) -> int:
    """Measures, prints and publishes. Raises UserError for the same bad inputs as a run."""
    begin = time.monotonic()
    report = measure(recipe)
    report["seconds"] = round(time.monotonic() - begin, 1)
    directory = storage.join(recipe.root, "plan")
    recipe.save(directory)
    storage.publish_json(storage.join(directory, "plan.json"), report)
    for name, draw in plan_plots.PLOTS.items():
        storage.publish_bytes(storage.join(directory, name), draw(report))
    print(plan_report.text(report, recipe))
    print(f"plan.json and {', '.join(plan_plots.PLOTS)} are in {directory} ({report['seconds']:.0f} s)")
    return 0


def measure(recipe: Recipe) -> dict[str, Any]:
    """The report, as published."""
    source = find_source(recipe)
    layers = student_layers(recipe.student, source.config.num_hidden_layers)
    encoder = preflight.encoder_of(source)
    corpus = sample_corpus(recipe.corpus, recipe.sequences, encoder)
    preflight.check_tokens(recipe, encoder, corpus.input_ids, corpus.token_count)
    sequences = _mask(recipe, source, encoder, corpus)
    dense = load_teacher(replace(recipe.teacher, dtype="float32"), "cpu", recipe.sequences.length)
    # Where the GPUs are not, as on the laptop a pass is planned on, the CPU is measured, and said to be.
    device = "cuda" if recipe.teacher.gpus_per_worker and torch.cuda.is_available() else "cpu"
    own = dense
    if (recipe.teacher.dtype, device) != ("float32", "cpu"):
        own = load_teacher(recipe.teacher, device, recipe.sequences.length)
    layout, few = layout_of(recipe, source), sequences.rows(slice(_needed(sequences)))
    positions = _positions(recipe, few)
    hidden = _hidden(dense, recipe, layout, few, positions)
    with only_layers(dense, layers):
        student = _hidden(dense, recipe, layout, few, positions)["gradient"]
    as_run = hidden if own is dense else _hidden(own, recipe, layout, few, positions)
    head = DenseHead(dense.head)
    report: dict[str, Any] = {
        "name": recipe.name,
        "corpus": _corpus(recipe, corpus),
        "kept_mass": _kept_mass(recipe, head, hidden),
        "gradient_error": {
            "student_layers": layers,
            **compare_targets(
                head,
                hidden["gradient"],
                student,
                as_run["gradient"],
                recipe.teacher.dtype,
                _top_k(recipe, head.vocab_size),
                recipe.train.temperature,
            ),
        },
        "bytes": _bytes(recipe, layout, corpus),
        "time": _time(recipe, layout, own, sequences, corpus.tokens * recipe.masking.replicas),
    }
    report = _finite(report)
    return {**report, "recommendation": plan_report.recommend(report, recipe)}


def _finite(value: Any) -> Any:
    """The same with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _corpus(recipe: Recipe, sample: CorpusSample) -> dict[str, Any]:
    names = ("size", "read", "unit", "places", "tokens", "sequences", "relative_error", "exact")
    return {
        **{name: getattr(sample, name) for name in names},
        "replicas": recipe.masking.replicas,
        "problems": sample.problems.counts,
        "problems_summary": sample.problems.summary(),
    }


def _mask(recipe: Recipe, source: Source, encoder: Encoder, sample: CorpusSample) -> Sequences:
    """All sequences of the sample, shuffled (its places are in order), masked as replica 0 would be.

    Those of unknown tokens alone, where nothing is masked, come last.
    """
    order = np.random.default_rng(0).permutation(len(sample.input_ids))
    input_ids, token_count = sample.input_ids[order], sample.token_count[order]
    masking = recipe.masking
    counts = np.bincount(input_ids.ravel(), minlength=encoder.vocab_size)
    counts[list(encoder.special_ids)] = 0
    vocab: MaskVocab = mask_vocab(
        masking,
        source.tokenizer.mask_token_id,
        encoder.special_ids,
        encoder.vocab_size,
        counts,
        encoder.content() if masking.whole_word else None,
    )
    masked = mask_sequences(input_ids, token_count, np.arange(len(order)), 0, masking, vocab)
    found = Sequences(masked.input_ids, masked.positions, token_count)
    return found.rows(np.argsort(masked.positions[:, 0] < 0, kind="stable"))


# Kept mass and gradient errors


def _kept_mass(recipe: Recipe, head: DenseHead, hidden: dict[str, Tensor]) -> dict[str, Any]:
    ks = sorted({min(k, head.vocab_size) for k in (*KS, _top_k(recipe, head.vocab_size))})
    temperatures = sorted({*TEMPERATURES, *recipe.store.temperatures, recipe.train.temperature})
    kinds = {kind: hidden[kind] for kind in ("masked", "unmasked")}
    return {
        "ks": ks,
        "temperatures": temperatures,
        "positions": {kind: len(states) for kind, states in kinds.items()},
        **{kind: kept_mass(head, states, ks, temperatures).tolist() for kind, states in kinds.items()},
    }


def _top_k(recipe: Recipe, vocab_size: int) -> int:
    return min(recipe.store.top_k or DEFAULT_TOP_K, vocab_size)


def _positions(recipe: Recipe, sequences: Sequences) -> dict[str, np.ndarray]:
    """Flat positions of the sequences [n * L] that are looked at, by what for; at least one is masked."""
    positions = sequences.positions
    real = np.arange(recipe.sequences.length) < sequences.token_count[:, None]
    masked = np.zeros_like(real)
    row, slot = np.nonzero(positions >= 0)
    masked[row, positions[row, slot]] = True
    learnt = masked if recipe.train.kl_positions == "masked" else real
    return {
        "masked": _choose(masked, MASS_POSITIONS),
        "unmasked": _choose(real & ~masked, MASS_POSITIONS),
        "gradient": _choose(learnt, GRADIENT_POSITIONS),
    }


def _needed(sequences: Sequences) -> int:
    """How many sequences have enough masked positions and not too many tokens."""
    masked = (sequences.positions >= 0).sum(axis=1).cumsum()
    tokens = sequences.token_count.astype(np.int64).cumsum()
    enough = int(np.searchsorted(masked, MASS_POSITIONS)) + 1
    return max(1, min(enough, int(np.searchsorted(tokens, SAMPLE_TOKENS, side="right"))))


def _choose(wanted: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of the positions [n, L] that are True, flat, ascending."""
    (flat,) = np.nonzero(wanted.ravel())
    return np.sort(np.random.default_rng(1).permutation(flat)[:count])


@torch.no_grad()
def _hidden(
    loaded: LoadedTeacher,
    recipe: Recipe,
    layout: Layout,
    sequences: Sequences,
    wanted: dict[str, np.ndarray],
) -> dict[str, Tensor]:
    """Hidden states float32 [N, D] at flat positions of the sequences.

    UserError where some are no finite numbers, as float16 may have it.
    """
    capture = Capture(loaded, replace(layout, top_k=0, hidden_states="float16"))
    states = []
    for start in range(0, len(sequences.token_count), recipe.teacher.batch_size):
        batch = sequences.rows(slice(start, start + recipe.teacher.batch_size))
        encoded = capture.encode(batch.input_ids, batch.token_count)
        states.append(encoded.float().cpu().flatten(0, 1))
    flat = torch.cat(states)
    found = {kind: flat[torch.from_numpy(positions)] for kind, positions in wanted.items()}
    if not all(bool(states.isfinite().all()) for states in found.values()):
        raise preflight.not_finite(recipe, str(loaded.dtype).removeprefix("torch."))
    return found


# Bytes and time


def _bytes(recipe: Recipe, own: Layout, sample: CorpusSample) -> dict[str, Any]:
    """Of every form of store: bytes a token by column, and the shards of all replicas."""
    k = _top_k(recipe, own.vocab_size)
    best = {"top_k": k, "temperatures": recipe.store.temperatures or (1.0,)}
    forms: dict[str, dict[str, Any]] = {
        "this recipe": {},
        f"top-{k} alone": {**best, "hidden_states": "none"},
        "int8 hidden states": {"top_k": 0, "hidden_states": "int8"},
        "float16 hidden states": {"top_k": 0, "hidden_states": "float16"},
        f"top-{k} and int8": {**best, "hidden_states": "int8"},
        f"top-{k} and float16": {**best, "hidden_states": "float16"},
    }
    found, per_token = {}, sample.sequences / sample.tokens
    for name, changes in forms.items():
        layout = replace(own, **changes)
        found[name] = {
            "columns": {column: spec.bytes * per_token for column, spec in layout.columns().items()},
            "per_token": layout.bytes_per_sample() * per_token,
            "total": layout.bytes_per_sample() * sample.sequences * recipe.masking.replicas,
            "top_k": layout.top_k,
            "hidden_states": layout.hidden_states,
        }
    return found


def _time(
    recipe: Recipe, layout: Layout, loaded: LoadedTeacher, sequences: Sequences, tokens: int
) -> dict[str, Any]:
    rates = _rates(recipe, layout, loaded, sequences)
    rate = statistics.median(rates)
    workers = sorted({*WORKERS, recipe.teacher.workers})
    return {
        "tokens_per_s": rate,
        "batches": len(rates),
        "batch_size": recipe.teacher.batch_size,
        "dtype": recipe.teacher.dtype,
        "device": loaded.device.type,
        "gpus_per_worker": recipe.teacher.gpus_per_worker,
        "cpu_threads": recipe.teacher.cpu_threads,
        "cpus": os.cpu_count(),
        "workers": recipe.teacher.workers,
        "hours": {str(count): tokens / rate / count / 3600 for count in workers},
    }


def _rates(recipe: Recipe, layout: Layout, loaded: LoadedTeacher, sequences: Sequences) -> list[float]:
    """Tokens/s of batches through the code that a worker runs, with its threads; one warms up."""
    size = recipe.teacher.batch_size
    order = np.argsort(-sequences.token_count.astype(np.int64), kind="stable")  # like lengths, as in a shard
    capture = Capture(loaded, layout)
    starts = np.linspace(0, max(0, len(order) - size), SPEED_BATCHES[1]).astype(int)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.teacher.cpu_threads)
    try:
        rates: list[float] = []
        begin = time.perf_counter()
        for start in (starts[0], *starts):
            batch = sequences.rows(np.resize(order[start : start + size], size))
            before = time.perf_counter()
            capture.batch(batch.input_ids, batch.token_count, batch.positions)
            rates.append(float(batch.token_count.sum()) / (time.perf_counter() - before))
            if len(rates) > SPEED_BATCHES[0] and time.perf_counter() - begin > SPEED_SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    return rates[1:]
