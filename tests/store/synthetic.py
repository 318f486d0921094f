"""Small complete stores of random numbers that fit together: top-k and logsumexp follow from the stored
hidden states through the stored head, computed in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from infra import storage
from offline_teacher.store.head import MlmHead
from offline_teacher.store.manifest import Declaration
from offline_teacher.store.quantise import dequantise, quantise
from offline_teacher.store.reader import Store, open_store
from offline_teacher.store.schema import FORMAT_VERSION, Layout, ShardPlan, SpecialIds
from offline_teacher.store.writer import begin_store, finish_store, write_head, write_shard

SPECIAL = SpecialIds(pad=0, mask=4, cls=2, sep=3)
FIRST_WORD = 5


def small_layout(**changes: object) -> Layout:
    """L 12, M 2, V 40, K 4, T 1 and 2, D 8, float16 hidden states at all positions."""
    fields: dict = {
        "length": 12,
        "masked": 2,
        "vocab_size": 40,
        "top_k": 4,
        "temperatures": (1.0, 2.0),
        "hidden_size": 8,
        "hidden_states": "float16",
        "positions": "all",
    }
    return Layout(**{**fields, **changes})


def make_store(
    path: str, layout: Layout | None = None, plan: ShardPlan | None = None, seed: int = 0
) -> Store:
    """Writes a finished store of ``plan`` (default: 10 sequences, 2 replicas, 4 a shard) and opens it."""
    declaration = make_declaration(layout, plan, seed)
    begin_store(path, declaration)
    write_files(path, declaration, seed)
    for replica, index in declaration.plan.shard_ids():
        write_shard(path, declaration, replica, index, make_columns(declaration, replica, index, seed))
    finish_store(path)
    return open_store(path)


def make_declaration(
    layout: Layout | None = None, plan: ShardPlan | None = None, seed: int = 0
) -> Declaration:
    fingerprint = {"recipe": {"masking": {"seed": seed}}, "teacher": "synthetic", "format": FORMAT_VERSION}
    return Declaration(layout or small_layout(), plan or ShardPlan(10, 2, 4), SPECIAL, fingerprint)


def write_files(path: str, declaration: Declaration, seed: int = 0) -> None:
    """Head, teacher configuration, tokenizer, recipe and a stand-in for the sequences."""
    layout = declaration.layout
    write_head(path, make_head(layout, seed))
    config = {"hidden_act": "gelu", "hidden_size": layout.hidden_size, "vocab_size": layout.vocab_size}
    storage.publish_json(storage.join(path, "teacher", "config.json"), config)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"w{i}" for i in range(FIRST_WORD, layout.vocab_size)),
    ]
    storage.publish_bytes(storage.join(path, "tokenizer", "vocab.txt"), "\n".join(words).encode())
    storage.publish_json(
        storage.join(path, "sequences", "index.json"), {"sequences": declaration.plan.sequences}
    )
    storage.publish_bytes(storage.join(path, "recipe.yaml"), json.dumps({"name": "synthetic"}).encode())


def make_head(layout: Layout, seed: int = 0) -> MlmHead:
    V, D = layout.vocab_size, layout.hidden_size  # noqa: N806
    random = np.random.default_rng((seed, 1))

    def normal(*shape: int, scale: float) -> np.ndarray:
        return random.normal(0, scale, shape).astype(np.float32)

    return MlmHead(
        dense_weight=normal(D, D, scale=D**-0.5),
        dense_bias=normal(D, scale=0.1),
        layer_norm_weight=1 + normal(D, scale=0.1),
        layer_norm_bias=normal(D, scale=0.1),
        decoder_weight=normal(V, D, scale=2 * D**-0.5),
        decoder_bias=normal(V, scale=0.5),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )


def make_columns(declaration: Declaration, replica: int, index: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The columns of one shard. The unmasked tokens of a sequence are the same in every replica."""
    layout, ids = declaration.layout, declaration.plan.sequence_range(index)
    columns = {name: np.zeros((len(ids), *c.shape), c.dtype) for name, c in layout.columns().items()}
    columns["sequence_id"][:] = ids
    columns["masked_positions"][:] = -1
    for row, sequence in enumerate(ids):
        _tokens(layout, {name: array[row] for name, array in columns.items()}, (seed, sequence), replica)
        columns["token_count"][row] = (columns["input_ids"][row] != SPECIAL.pad).sum()
    _teacher(layout, columns, make_head(layout, seed), np.random.default_rng((seed, 2, replica, index)))
    return columns


def _tokens(layout: Layout, row: dict[str, np.ndarray], key: tuple[int, int], replica: int) -> None:
    random = np.random.default_rng(key)
    length = layout.length
    count = length if random.random() < 0.7 else int(random.integers(min(3, length), length + 1))
    row["input_ids"][:count] = random.integers(FIRST_WORD, layout.vocab_size, count)
    row["input_ids"][0], row["input_ids"][count - 1] = SPECIAL.cls, SPECIAL.sep
    again = np.random.default_rng((*key, replica))
    maskable = np.arange(1, count - 1)
    chosen = np.sort(again.choice(maskable, min(layout.masked, len(maskable)), replace=False))
    row["masked_positions"][: len(chosen)] = chosen
    row["masked_labels"][: len(chosen)] = row["input_ids"][chosen]
    row["input_ids"][chosen] = SPECIAL.mask


def _teacher(
    layout: Layout, columns: dict[str, np.ndarray], head: MlmHead, random: np.random.Generator
) -> None:
    n = len(columns["sequence_id"])
    if layout.positions == "masked":
        used = columns["masked_positions"] >= 0
    else:
        used = np.arange(layout.length) < columns["token_count"][:, None]
    hidden = random.normal(0, 1, (n, layout.recorded, layout.hidden_size)) * used[..., None]
    stored = hidden.astype(np.float16).astype(np.float64)
    if layout.hidden_states == "float16":
        columns["hidden_states"][:] = stored
    if layout.hidden_states == "int8":
        columns["hidden_states"][:], columns["hidden_scale"][:] = quantise(hidden)
        stored = dequantise(columns["hidden_states"], columns["hidden_scale"]).astype(np.float64)
    if layout.top_k == 0:
        return
    for rows in _blocks(n, 64):
        logits = head.logits(stored[rows].reshape(-1, layout.hidden_size))
        top = np.argsort(-logits, axis=-1, kind="stable")[:, : layout.top_k]
        kept = (-1, layout.recorded, layout.top_k)
        mask = used[rows][..., None]
        columns["topk_ids"][rows] = top.reshape(kept) * mask
        columns["topk_logits"][rows] = np.take_along_axis(logits, top, axis=-1).reshape(kept) * mask
        for j, temperature in enumerate(layout.temperatures):
            peak = logits.max(axis=-1, keepdims=True)
            total = np.log(np.exp((logits - peak) / temperature).sum(axis=-1)) + peak[:, 0] / temperature
            columns["logsumexp"][rows, :, j] = total.reshape(-1, layout.recorded) * used[rows]


def _blocks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, start + size)
