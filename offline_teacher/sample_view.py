"""``inspect``: what the teacher said about one sample, and its shard in numbers, for a person to read."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from infra import storage
from infra.console import table
from infra.errors import UserError
from offline_teacher.store.head import MlmHead
from offline_teacher.store.quantise import dequantise
from offline_teacher.store.reader import Shard, Store, open_store

SHOWN = 5
PLOT_KS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PLOT_POSITIONS = 256


@dataclass(frozen=True)
class Distributions:
    """The teacher's distributions at N recorded positions, at T = 1, as far as the store tells them."""

    ids: np.ndarray
    """[N, k] largest first; k = V where hidden states are stored, else K."""
    probabilities: np.ndarray
    """float64 [N, k]"""

    @property
    def entropy(self) -> np.ndarray:
        """Nats [N]; what is outside ``ids`` counts as one outcome, so it is a lower bound where k < V."""
        p = np.concatenate([self.probabilities, self.tail(self.ids.shape[1])[:, None]], axis=1)
        return 0.0 - np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1)  # a plain minus makes -0 of 0

    def tail(self, k: int) -> np.ndarray:
        """Mass outside the first k [N]."""
        return np.clip(1.0 - self.probabilities[:, :k].sum(axis=1), 0.0, 1.0)


def show(root: str, replica: int, sequence_id: int, plot: str | None) -> int:
    """Prints sample (sequence, replica) and its shard; with ``plot``, writes the kept-mass PNG."""
    if plot is not None:
        _require_picture(plot)
    store = open_store(root)
    plan = store.plan
    if not 0 <= sequence_id < plan.sequences or not 0 <= replica < plan.replicas:
        raise UserError(
            f"--sample {sequence_id} --replica {replica}: {root} has sequences 0 to {plan.sequences - 1} and"
            f" replicas 0 to {plan.replicas - 1}"
        )
    shard = store.shard(replica, sequence_id // plan.samples_per_shard)
    head = store.head() if store.layout.hidden_states != "none" else None
    print(_sample(store, shard, head, sequence_id - int(shard.sequence_ids[0]), _tokenizer(store)))
    print(_summary(store, shard))
    if plot is not None:
        storage.publish_bytes(plot, _kept_mass(store, shard, head))
        print(f"plot: {plot}")
    return 0


def _require_picture(path: str) -> None:
    """UserError where no picture can be written there."""
    if not path.lower().endswith(".png") or os.path.isdir(path):
        raise UserError(f"--plot {path or repr(path)}: give the name of a file that ends in .png")
    if storage.is_remote(path):
        return
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
        raise UserError(f"--plot {path}: there is no directory {directory}")
    if not os.access(directory, os.W_OK):
        raise UserError(f"--plot {path}: nothing can be written in {directory}")


def _tokenizer(store: Store) -> Tokenizer:
    try:
        return Tokenizer.from_str(store.tokenizer_files()["tokenizer.json"].decode())
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
        reason = str(error).strip().partition("\n")[0].rstrip(": ")
        raise UserError(
            f"{store.root}/tokenizer/tokenizer.json: cannot be loaded ({reason}); it is as the pass left it,"
            " so use the version of tokenizers that made the store"
        ) from None


def _sample(store: Store, shard: Shard, head: MlmHead | None, row: int, tokenizer: Tokenizer) -> str:
    columns = shard.columns
    count = int(columns["token_count"][row])
    ids = columns["input_ids"][row, :count].astype(np.int64)
    positions = columns["masked_positions"][row]
    slots = np.flatnonzero(positions >= 0)
    recorded = positions[slots] if store.layout.positions == "all" else slots
    found = distributions(store, shard, head, np.full(len(recorded), row), recorded)
    k = store.layout.top_k or SHOWN
    rows = []
    for at, slot in enumerate(slots):
        best = [_token(tokenizer, token) for token in found.ids[at, :SHOWN].tolist()]
        # Two spaces: every other mark may be a token.
        told = "  ".join(f"{token} {p:.3f}" for token, p in zip(best, found.probabilities[at], strict=False))
        true, seen = map(
            tokenizer.id_to_token, (int(columns["masked_labels"][row, slot]), int(ids[positions[slot]]))
        )
        rows.append(
            [int(positions[slot]), true, seen, told, f"{found.entropy[at]:.2f}", f"{found.tail(k)[at]:.3f}"]
        )
    entropy = "entropy" if found.ids.shape[1] == store.layout.vocab_size else "entropy, at least"
    headers = ["position", "true", "seen", f"teacher's top {SHOWN}", entropy, f"tail beyond {k}"]
    title = f"sample {int(shard.sequence_ids[row])}, replica {shard.replica}, {count} tokens"
    return "\n".join(
        [title, tokenizer.decode(ids.tolist(), skip_special_tokens=False), "", table(rows, headers), ""]
    )


def _token(tokenizer: Tokenizer, number: int) -> str:
    """The token of an id; ``id 31000`` for a row of embeddings that has no token."""
    token = tokenizer.id_to_token(number)
    return f"id {number}" if token is None else token


def distributions(
    store: Store, shard: Shard, head: MlmHead | None, rows: np.ndarray, slots: np.ndarray
) -> Distributions:
    """At recorded ``slots`` of samples ``rows``, each [N]: by the head where there are hidden states."""
    columns = shard.columns
    if head is None:
        logits = columns["topk_logits"][rows, slots].astype(np.float64)
        at_one = store.layout.temperatures.index(1.0)
        total = columns["logsumexp"][rows, slots, at_one].astype(np.float64)
        p = np.minimum(np.exp(logits - total[:, None]), 1.0)  # float16 may have rounded a logit up
        return Distributions(columns["topk_ids"][rows, slots].astype(np.int64), p)
    hidden = columns["hidden_states"][rows, slots]
    if store.layout.hidden_states == "int8":
        hidden = dequantise(hidden, columns["hidden_scale"][rows, slots])
    logits = head.logits(hidden.astype(np.float64))
    order = np.argsort(-logits, axis=1, kind="stable")
    p = np.exp(np.take_along_axis(logits, order, axis=1) - logits.max(axis=1, keepdims=True))
    return Distributions(order, p / p.sum(axis=1, keepdims=True))


def _summary(store: Store, shard: Shard) -> str:
    columns, layout = shard.columns, store.layout
    counts = columns["token_count"]
    rows = [
        ["samples", f"{len(shard):,}"],
        ["tokens", f"{int(counts.sum()):,} ({counts.min()} to {counts.max()} a sample)"],
        ["masked", f"{int((columns['masked_positions'] >= 0).sum()):,}"],
        ["bytes a token", f"{layout.bytes_per_sample() * len(shard) / counts.sum():,.0f}"],
    ]
    used = (
        np.arange(layout.length) < counts[:, None]
        if layout.positions == "all"
        else columns["masked_positions"] >= 0
    )
    if layout.top_k:
        largest = columns["topk_logits"][..., 0][used].astype(np.float64)
        rows.append(
            ["largest logit", f"mean {largest.mean():.2f}, {largest.min():.2f} to {largest.max():.2f}"]
        )
    for j, temperature in enumerate(layout.temperatures if layout.top_k else ()):
        logits = columns["topk_logits"][used].astype(np.float64) / temperature
        kept = np.exp(logits - columns["logsumexp"][..., j][used][:, None]).sum(axis=1)
        rows.append(
            [
                f"mass kept by {layout.top_k} at T = {temperature:g}",
                f"mean {kept.mean():.3f}, least {kept.min():.3f}",
            ]
        )
    if layout.hidden_states != "none":
        size = np.abs(columns["hidden_states"][used].astype(np.float32))
        if layout.hidden_states == "int8":
            size = size * columns["hidden_scale"][used][:, None]
        rows.append(["|hidden state|", f"mean {size.mean():.3f}, largest {size.max():.2f}"])
    return f"shard {shard.index} of replica {shard.replica}\n{table(rows, ['', ''])}"


def _kept_mass(store: Store, shard: Shard, head: MlmHead | None) -> bytes:
    """A PNG: probability kept by the k most likely tokens over k, the store's own K among them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, masked = np.nonzero(shard.columns["masked_positions"] >= 0)
    slots = shard.columns["masked_positions"][rows, masked] if store.layout.positions == "all" else masked
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), PLOT_POSITIONS)).astype(np.int64)
    found = distributions(store, shard, head, rows[chosen], slots[chosen])
    ks = sorted({k for k in (*PLOT_KS, store.layout.top_k) if 0 < k <= found.ids.shape[1]})
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(ks, [1 - found.tail(k).mean() for k in ks], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="k", ylabel="probability kept at T = 1", ylim=(0, 1.02))
    axes.grid(color="0.92")
    axes.set_title(f"{len(chosen)} masked positions of shard {shard.index}, replica {shard.replica}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
