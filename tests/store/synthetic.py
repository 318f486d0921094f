"""Small finished stores of random numbers that are possible: what a teacher pass leaves, without the pass.

Top-k and logsumexp follow, in float64, from the stored hidden states through a random linear decoder, unless
the caller gives numbers of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from infra.files import storage
from offline_teacher.store.blocks import dequantise
from offline_teacher.store.manifest import Spec
from offline_teacher.store.numbering import SplitPlan, Task
from offline_teacher.store.parts import publish_part
from offline_teacher.store.paths import CONFIG, POOLING, WEIGHTS
from offline_teacher.store.schema import FORMAT_VERSION, Layout, Plan, SpecialIds
from offline_teacher.store.store import Store, open_store
from offline_teacher.store.writer import TaskWriter, begin_store, finish_store

SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4)
FIRST_WORD = 5
ENVIRONMENT = {"device": "cpu", "torch": "2.9.0", "batch_size": 8}
ROWS = {"train": (10, 0, 5), "validation": (4,)}

POOLED: dict[str, Any] = {
    "mode": "mean",
    "normalise": False,
    "prompts": {},
    "default_prompt": None,
    "max_length": None,
}
"""How the teacher of a store of vectors pools."""

Columns = dict[str, np.ndarray]
Teacher = Callable[[Layout, Columns, np.random.Generator], None]
"""Fills the teacher's columns of samples whose text is there already."""


def small_layout(**changes: object) -> Layout:
    """L 12, M 2, V 40, K 4, T 1 and 2, D 8, float16 hidden states at all positions."""
    fields: dict[str, Any] = {
        "length": 12,
        "masked": 2,
        "vocab_size": 40,
        "hidden_size": 8,
        "top_k": 4,
        "temperatures": (1.0, 2.0),
        "hidden_states": "float16",
        "positions": "all",
    }
    return Layout(**{**fields, **changes})


def small_plan(**changes: int) -> Plan:
    """2 masking epochs, tasks of 7 sequences, blocks of 2 samples, shards of 2 blocks."""
    fields = {"masking_epochs": 2, "task_sequences": 7, "block_samples": 2, "shard_blocks": 2}
    return Plan(**{**fields, **changes})


def make_spec(layout: Layout | None = None, plan: Plan | None = None, seed: int = 0) -> Spec:
    """A spec whose fingerprint says no more than the seed."""
    fingerprint = {
        "recipe": {"masking": {"seed": seed}},
        "teacher": storage.digest_bytes(b"teacher"),
        "tokenizer": storage.digest_bytes(b"tokenizer"),
        "architecture": "bert",
        "corpus": {"train": storage.digest_bytes(b"text")},
        "format": FORMAT_VERSION,
    }
    return Spec(layout or small_layout(), plan or small_plan(), SPECIAL, fingerprint)


def make_store(
    root: str,
    layout: Layout | None = None,
    rows: Mapping[str, tuple[int, ...]] = ROWS,
    plan: Plan | None = None,
    seed: int = 0,
    teacher: Teacher | None = None,
    config: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
) -> Store:
    """Writes a finished store with these rows of each part of each split, and opens it."""
    spec = make_spec(layout, plan, seed)
    begin_store(root, spec)
    write_files(root, spec, config, weights, tokenizer)
    for split, counts in rows.items():
        split_plan = SplitPlan.of(split, counts, spec.plan)
        for part in range(len(counts)):
            write_part(root, spec, split_plan, split, part, seed)
        for task in split_plan.tasks():
            write_task(root, spec, split, task, seed, teacher)
    finish_store(root, {split: len(counts) for split, counts in rows.items()})
    return open_store(root)


def write_files(
    root: str,
    spec: Spec,
    config: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
) -> None:
    """The files of tokenizer (name -> content) and teacher."""
    layout = spec.layout
    sizes = {"model_type": "bert", "hidden_size": layout.hidden_size, "vocab_size": layout.vocab_size}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{number}" for number in range(len(words), layout.vocab_size)]
    files = {
        CONFIG: json.dumps(dict(config or sizes)).encode(),
        WEIGHTS: save(dict(weights or {"decoder": decoder(layout)})),
    }
    for name, data in (tokenizer or {"vocab.txt": "\n".join(words).encode()}).items():
        files[f"tokenizer/{name}"] = data
    if layout.positions == "pooled":
        files[POOLING] = json.dumps(POOLED).encode()
    for name, data in files.items():
        storage.publish_if_changed(storage.join(root, name), data)


def write_part(root: str, spec: Spec, plan: SplitPlan, split: str, part: int, seed: int = 0) -> None:
    """The text of one part."""
    tasks = [task for task in map(plan.task, range(plan.tasks_per_epoch)) if task.part == part]
    text = [make_text(spec.layout, split, task, seed) for task in tasks]
    layout = spec.layout.columns()
    columns = {
        name: np.concatenate(
            [np.zeros((0, *layout[name].shape), layout[name].dtype)] + [c[name] for c in text]
        )
        for name in ("input_ids", "token_count")
    }
    digest = storage.digest_bytes(f"{split} {part}".encode())
    facts = {"text": digest, "made_from": digest, "documents": 1, "text_bytes": 100, "problems": {}}
    publish_part(root, spec.layout, split, part, columns, facts)


def write_task(
    root: str, spec: Spec, split: str, task: Task, seed: int = 0, teacher: Teacher | None = None
) -> None:
    """One task, written and published."""
    with TaskWriter(root, spec, split, task, ENVIRONMENT) as writer:
        writer.write(make_columns(spec, split, task, seed, teacher))
        writer.publish()


def make_columns(
    spec: Spec, split: str, task: Task, seed: int = 0, teacher: Teacher | None = None
) -> Columns:
    """The columns of one task. The unmasked tokens of a sequence are the same in every masking epoch."""
    layout = spec.layout
    columns = {n: np.zeros((task.samples, *c.shape), c.dtype) for n, c in layout.data_columns().items()}
    columns["sequence_id"][:] = task.sequence_ids()
    columns.update(make_text(layout, split, task, seed))
    key = (seed, split == "train", task.part, task.rows.start, task.epoch)
    if layout.masked:
        _mask(columns, np.random.default_rng((*key, 1)))
    (teacher or random_teacher)(layout, columns, np.random.default_rng((*key, 2)))
    return columns


def make_text(layout: Layout, split: str, task: Task, seed: int = 0) -> Columns:
    """``input_ids`` before masking, and ``token_count``: seven of ten sequences are full."""
    random = np.random.default_rng((seed, split == "train", task.part, task.rows.start))
    n, L = task.samples, layout.length  # noqa: N806
    count = np.where(random.random(n) < 0.7, L, random.integers(min(3, L), L + 1, n))
    ids = random.integers(FIRST_WORD, layout.vocab_size, (n, L))
    ids[:, 0], ids[np.arange(n), count - 1] = SPECIAL.cls, SPECIAL.sep
    ids[np.arange(L) >= count[:, None]] = SPECIAL.pad
    return {"input_ids": ids.astype(layout.id_dtype), "token_count": count.astype(np.uint16)}


def _mask(columns: Columns, random: np.random.Generator) -> None:
    ids, count, slots = columns["input_ids"], columns["token_count"], columns["masked_positions"].shape[1]
    n, L = ids.shape  # noqa: N806
    place = np.arange(L)
    luck = np.where((place > 0) & (place < count[:, None] - 1), random.random((n, L)), 2.0)
    chosen = np.argsort(luck, axis=1, kind="stable")[:, :slots]
    used = np.arange(slots) < np.minimum(slots, count.astype(int) - 2)[:, None]
    positions = np.sort(np.where(used, chosen, L), axis=1)
    labels = np.take_along_axis(ids, np.minimum(positions, L - 1), axis=1)
    columns["masked_positions"][:] = np.where(used, positions, -1)
    columns["masked_labels"][:] = np.where(used, labels, 0)
    row, slot = np.nonzero(used)
    ids[row, positions[row, slot]] = SPECIAL.mask


def decoder(layout: Layout) -> np.ndarray:
    """float32 [V, D]: what turns hidden states into logits here."""
    return np.random.default_rng(7).normal(0, 1, (layout.vocab_size, layout.hidden_size)).astype(np.float32)


def recorded_slots(layout: Layout, columns: Columns) -> np.ndarray:
    """bool [n, P]: recorded positions with a token."""
    if layout.positions == "masked":
        return np.asarray(columns["masked_positions"] >= 0)
    return np.asarray(np.arange(layout.length) < columns["token_count"][:, None])


def quantise(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 and scale of hidden states, as a teacher's worker makes them."""
    import torch

    from offline_teacher.inference.quantise import quantise as of_tensor

    steps, scale = of_tensor(torch.from_numpy(hidden))
    return steps.numpy(), scale.numpy()


def random_teacher(layout: Layout, columns: Columns, random: np.random.Generator) -> None:
    """Random hidden states; top-k logits and logsumexp of them through ``decoder``."""
    n, D = len(columns["sequence_id"]), layout.hidden_size  # noqa: N806
    if layout.positions == "pooled":
        columns["embedding"][:] = random.normal(0, 1, (n, D))
        return
    used = recorded_slots(layout, columns)
    hidden = np.where(used[..., None], random.normal(0, 1, (n, layout.recorded, D)), 0).astype(np.float32)
    if layout.hidden_states == "float16":
        columns["hidden_states"][:] = hidden
        hidden = columns["hidden_states"].astype(np.float32)
    elif layout.hidden_states == "bfloat16":
        columns["hidden_states"][:] = hidden.view(np.uint32) >> 16
        hidden = (columns["hidden_states"].astype(np.uint32) << 16).view(np.float32)
    elif layout.hidden_states == "int8":
        columns["hidden_states"][:], columns["hidden_scale"][:] = quantise(hidden)
        hidden = dequantise(columns["hidden_states"], columns["hidden_scale"])
    if layout.top_k:
        _targets(layout, columns, hidden.astype(np.float64) @ decoder(layout).T.astype(np.float64), used)


def _targets(layout: Layout, columns: Columns, logits: np.ndarray, used: np.ndarray) -> None:
    best = np.argpartition(-logits, layout.top_k - 1, axis=-1)[..., : layout.top_k]
    order = np.argsort(-np.take_along_axis(logits, best, axis=-1), axis=-1)
    top = np.take_along_axis(best, order, axis=-1)
    columns["topk_ids"][:] = top * used[..., None]
    columns["topk_logits"][:] = np.take_along_axis(logits, top, axis=-1) * used[..., None]
    peak = logits.max(axis=-1, keepdims=True)
    for slot, temperature in enumerate(layout.temperatures):
        total = np.log(np.exp((logits - peak) / temperature).sum(axis=-1)) + peak[..., 0] / temperature
        columns["logsumexp"][..., slot] = total * used
