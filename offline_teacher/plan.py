"""``plan``: what a store would cost, keep, and how wrong each soft target would be, before it is paid for.

A few places of the corpus are read, the teacher runs on some tens of their sequences, and the rest is
arithmetic. Everything is printed, and published as ``runs/<name>/plan/plan.json`` with three plots:

corpus          size and read (in units of ``unit``), places, exact (all of it was read), problems (kind ->
                count); of one replica: tokens, sequences, relative_error (standard error of tokens); replicas
kept_mass       ks, temperatures, positions (kind -> how many), masked and unmasked: [T][k]
gradient_error  temperature, positions, top_k, student_layers, close_step; at_initialisation and
                close_to_teacher: soft target -> relative error of the head's gradient, see
                soft_target_error.py; as_captured: the soft target of the teacher in the recipe's dtype (of
                the others: in float32), null where that is float32
bytes           form of store -> columns (bytes a token), per_token, total (all replicas), top_k,
                hidden_states
time            tokens_per_s of one worker (median of batches) and its settings, hours: workers -> hours
recommendation  sentences
seconds         what the plan itself took
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra import storage
from infra.recipe import Recipe
from offline_teacher import plan_plots, plan_report
from offline_teacher.capture import Capture
from offline_teacher.capture_pass import Source, find_source
from offline_teacher.corpus_sample import CorpusSample, sample_corpus
from offline_teacher.masking import Masked, MaskVocab, mask_sequences, mask_vocab, masked_count
from offline_teacher.packing import Encoder, load_encoder
from offline_teacher.soft_target_error import (
    DenseHead,
    SoftTarget,
    as_stored,
    gradient_errors,
    kept_mass,
    only_layers,
    soft_targets,
    student_layers,
)
from offline_teacher.store.schema import Layout
from offline_teacher.teacher import LoadedTeacher, load_teacher, tokenizer_files

KS = (8, 16, 32, 64, 128, 256, 512)
TEMPERATURES = (1.0, 2.0, 4.0)
DEFAULT_TOP_K = 64
"""Compared where the recipe keeps no top-k."""
MASS_POSITIONS = 1024
"""Of each kind, masked and unmasked."""
GRADIENT_POSITIONS = 512
SAMPLE_TOKENS = 1 << 14
"""At most this many run through the teacher in float32."""
CLOSE_STEP = 0.05
"""The student close to the teacher has 95 % of the teacher's hidden states and 5 % of the first student's."""
SPEED_BATCHES = (3, 8)
SPEED_SECONDS = 12.0
"""Batches timed: at least three, then until eight or this long."""
WORKERS = (1, 8, 64)


@dataclass(frozen=True)
class Sequences:
    """Masked sequences of the sample, in random order: what run through the teacher would be."""

    masked: Masked
    token_count: np.ndarray
    """[n]"""


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
    encoder = _encoder(source)
    corpus = sample_corpus(recipe.corpus, recipe.sequences, encoder)
    sequences = _mask(recipe, source, encoder, corpus)
    exact = load_teacher(replace(recipe.teacher, dtype="float32"), "cpu", recipe.sequences.length)
    own = exact
    if recipe.teacher.dtype != "float32" or recipe.teacher.gpus_per_worker:
        device = "cuda" if recipe.teacher.gpus_per_worker else "cpu"
        own = load_teacher(recipe.teacher, device, recipe.sequences.length)
    report: dict[str, Any] = {"name": recipe.name, "corpus": _corpus(recipe, corpus)}
    count = _needed(sequences)
    positions = _positions(recipe, sequences, count)
    hidden = _hidden(exact, sequences, count, recipe, positions)
    with only_layers(exact, layers):
        student = _hidden(exact, sequences, count, recipe, positions)["gradient"]
    captured = hidden if own is exact else _hidden(own, sequences, count, recipe, positions)
    head = DenseHead(exact.head)
    report["kept_mass"] = _kept_mass(recipe, head, hidden)
    report["gradient_error"] = {
        "student_layers": layers,
        **_gradient_error(recipe, head, hidden["gradient"], student, captured["gradient"]),
    }
    report["bytes"] = _bytes(recipe, source, corpus)
    report["time"] = _time(recipe, own, source, sequences, corpus.tokens * recipe.masking.replicas)
    report["recommendation"] = plan_report.recommend(report, recipe)
    return report


def _encoder(source: Source) -> Encoder:
    with tempfile.TemporaryDirectory() as directory:
        for name, data in tokenizer_files(source.tokenizer).items():
            Path(directory, name).write_bytes(data)
        return load_encoder(directory)


def _corpus(recipe: Recipe, sample: CorpusSample) -> dict[str, Any]:
    return {
        "size": sample.size,
        "read": sample.read,
        "unit": sample.unit,
        "places": sample.places,
        "tokens": sample.tokens,
        "sequences": sample.sequences,
        "relative_error": None if np.isnan(sample.relative_error) else sample.relative_error,
        "exact": sample.exact,
        "replicas": recipe.masking.replicas,
        "problems": sample.problems.counts,
        "problems_summary": sample.problems.summary(),
    }


def _mask(recipe: Recipe, source: Source, encoder: Encoder, sample: CorpusSample) -> Sequences:
    """All sequences of the sample, shuffled (its places are in order), masked as replica 0 would be."""
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
    return Sequences(
        mask_sequences(input_ids, token_count, np.arange(len(order)), 0, masking, vocab), token_count
    )


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


def _gradient_error(
    recipe: Recipe, head: DenseHead, teacher: Tensor, student: Tensor, own: Tensor
) -> dict[str, Any]:
    """All hidden states float32 [N, D]; ``own`` are those of the teacher in the recipe's dtype."""
    top_k, kind = _top_k(recipe, head.vocab_size), recipe.store.hidden_states
    targets = soft_targets(teacher, top_k)
    as_captured = None
    if recipe.teacher.dtype != "float32":
        stored = "int8" if kind == "int8" else "float16"
        as_captured = f"exact, {recipe.teacher.dtype} teacher, {stored}"
        targets.append(SoftTarget(as_captured, hidden=as_stored(own, stored)))
    students = {"at_initialisation": student, "close_to_teacher": teacher + CLOSE_STEP * (student - teacher)}
    temperature = recipe.train.temperature
    return {
        "temperature": temperature,
        "positions": len(teacher),
        "top_k": top_k,
        "as_captured": as_captured,
        "close_step": CLOSE_STEP,
        **{
            key: gradient_errors(head, teacher, hidden, targets, temperature)
            for key, hidden in students.items()
        },
    }


def _top_k(recipe: Recipe, vocab_size: int) -> int:
    return min(recipe.store.top_k or DEFAULT_TOP_K, vocab_size)


def _positions(recipe: Recipe, sequences: Sequences, count: int) -> dict[str, np.ndarray]:
    """Flat positions of the first ``count`` sequences [count * L] that are looked at, by what for."""
    token_count, positions = sequences.token_count[:count], sequences.masked.positions[:count]
    real = np.arange(recipe.sequences.length) < token_count[:, None]
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
    masked = (sequences.masked.positions >= 0).sum(axis=1).cumsum()
    tokens = sequences.token_count.astype(np.int64).cumsum()
    enough = int(np.searchsorted(masked, MASS_POSITIONS)) + 1
    return max(1, min(enough, int(np.searchsorted(tokens, SAMPLE_TOKENS, side="right"))))


def _choose(wanted: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of the positions [n, L] that are True, flat, ascending."""
    (flat,) = np.nonzero(wanted.ravel())
    return np.sort(np.random.default_rng(1).permutation(flat)[:count])


@torch.no_grad()
def _hidden(
    loaded: LoadedTeacher, sequences: Sequences, count: int, recipe: Recipe, wanted: dict[str, np.ndarray]
) -> dict[str, Tensor]:
    """Hidden states float32 [N, D] at flat positions of the first ``count`` sequences."""
    length, size = recipe.sequences.length, recipe.teacher.batch_size
    states = []
    capture = Capture(loaded, _layout(recipe, loaded.config, top_k=0, hidden_states="float16"))
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        states.append(
            capture.encode(sequences.masked.input_ids[rows], sequences.token_count[rows]).float().cpu()
        )
    flat = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in states])
    assert len(flat) == count * length
    return {kind: flat[torch.from_numpy(positions)] for kind, positions in wanted.items()}


# Bytes and time


def _layout(recipe: Recipe, config: dict[str, Any], **changes: Any) -> Layout:
    layout = Layout(
        length=recipe.sequences.length,
        masked=masked_count(recipe.sequences.length, recipe.masking.probability),
        vocab_size=config["vocab_size"],
        top_k=recipe.store.top_k,
        temperatures=recipe.store.temperatures,
        hidden_size=config["hidden_size"],
        hidden_states=recipe.store.hidden_states,
        positions=recipe.store.positions,
    )
    return replace(layout, **changes)


def _bytes(recipe: Recipe, source: Source, sample: CorpusSample) -> dict[str, Any]:
    """Of every form of store: bytes a token by column, and the shards of all replicas."""
    config = {"vocab_size": source.config.vocab_size, "hidden_size": source.config.hidden_size}
    k = _top_k(recipe, source.config.vocab_size)
    best = {"top_k": k, "temperatures": recipe.store.temperatures or (1.0,)}
    forms: dict[str, dict[str, Any]] = {
        "this recipe": {},
        f"top-{k} alone": {**best, "hidden_states": "none"},
        "int8 hidden states": {"top_k": 0, "hidden_states": "int8"},
        "float16 hidden states": {"top_k": 0, "hidden_states": "float16"},
        f"top-{k} and int8": {**best, "hidden_states": "int8"},
        f"top-{k} and float16": {**best, "hidden_states": "float16"},
    }
    found = {}
    for name, changes in forms.items():
        layout = _layout(recipe, config, **changes)
        per_token = sample.sequences / sample.tokens
        found[name] = {
            "columns": {column: spec.bytes * per_token for column, spec in layout.columns().items()},
            "per_token": layout.bytes_per_sample() * per_token,
            "total": layout.bytes_per_sample() * sample.sequences * recipe.masking.replicas,
            "top_k": layout.top_k,
            "hidden_states": layout.hidden_states,
        }
    return found


def _time(
    recipe: Recipe, loaded: LoadedTeacher, source: Source, sequences: Sequences, tokens: int
) -> dict[str, Any]:
    rates = _rates(recipe, loaded, sequences)
    rate = statistics.median(rates)
    workers = sorted({*WORKERS, recipe.teacher.workers})
    return {
        "tokens_per_s": rate,
        "batches": len(rates),
        "batch_size": recipe.teacher.batch_size,
        "dtype": recipe.teacher.dtype,
        "device": loaded.device.type,
        "cpu_threads": recipe.teacher.cpu_threads,
        "cpus": os.cpu_count(),
        "workers": recipe.teacher.workers,
        "hours": {str(count): tokens / rate / count / 3600 for count in workers},
    }


def _rates(recipe: Recipe, loaded: LoadedTeacher, sequences: Sequences) -> list[float]:
    """Tokens/s of batches through the code that a worker runs, with its threads; one warms up."""
    size = recipe.teacher.batch_size
    order = np.argsort(-sequences.token_count.astype(np.int64), kind="stable")  # like lengths, as in a shard
    capture = Capture(loaded, _layout(recipe, loaded.config))
    starts = np.linspace(0, max(0, len(order) - size), SPEED_BATCHES[1]).astype(int)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.teacher.cpu_threads)
    try:
        rates: list[float] = []
        begin = time.perf_counter()
        for start in (starts[0], *starts):
            rows = np.resize(order[start : start + size], size)
            before = time.perf_counter()
            capture.batch(
                sequences.masked.input_ids[rows],
                sequences.token_count[rows],
                sequences.masked.positions[rows],
            )
            rates.append(float(sequences.token_count[rows].sum()) / (time.perf_counter() - before))
            if len(rates) > SPEED_BATCHES[0] and time.perf_counter() - begin > SPEED_SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    return rates[1:]
