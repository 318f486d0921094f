"""The command ``inspect``: shows the teacher's predictions for one sample, and statistics of its task.

A position is recorded if the store holds the teacher's outputs for it; its slot is its index among these.
Axes: n samples, N recorded positions, V vocabulary, K top-k.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from infra.console import table
from infra.errors import UserError, first_line
from infra.files import storage
from offline_teacher.inputs.stored_teacher import decoder_input, stored_top
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.blocks import hidden_values
from offline_teacher.store.numbering import Task
from offline_teacher.store.schema import Columns
from offline_teacher.store.store import Store, open_store

if TYPE_CHECKING:
    from offline_teacher.models.replay import Replay

SHOWN = 5
"""Number of most likely tokens that are shown at a position."""
POSITIONS = 8
"""Number of positions shown of a text without masks, and of components shown of an embedding."""
SAMPLES = 64
"""Largest number of a task's samples, evenly spaced, whose teacher outputs are read for statistics: those of
a whole task may take many gigabytes."""


@dataclass(frozen=True)
class Distributions:
    """The teacher's distributions at T = 1 at N recorded positions, over the k most likely tokens."""

    ids: np.ndarray
    """Token ids [N, k], the most likely first. k is V if hidden states are stored, else K."""
    probabilities: np.ndarray
    """Probabilities of ``ids``, float64 [N, k]."""

    @property
    def entropy(self) -> np.ndarray:
        """Entropy in nats [N]. Tokens outside ``ids`` count as one outcome: for k < V it is a lower bound."""
        p = np.concatenate([self.probabilities, self.tail(self.ids.shape[1])[:, None]], axis=1)
        return 0.0 - np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1)  # a unary minus would give -0

    def tail(self, k: int) -> np.ndarray:
        """Returns the probability of all tokens except the k most likely ones [N]."""
        return np.clip(1.0 - self.probabilities[:, :k].sum(axis=1), 0.0, 1.0)


class TaskView:
    """Reads samples of one task, and computes the teacher's predictions for them from the stored columns."""

    def __init__(self, store: Store, split: str, task: Task) -> None:
        self.store, self.split, self.task = store, split, task
        self._reader = BlockReader(store, split, list(store.layout.data_columns()))

    def columns(self, rows: np.ndarray) -> Columns:
        """Reads all columns [n, ...] of n ascending rows of the task."""
        return self._reader.task_rows(self.task, rows)

    @property
    def has_token_distributions(self) -> bool:
        layout = self.store.layout
        return layout.top_k > 0 or (layout.hidden_states != "none" and self._replay is not None)

    def distributions(self, columns: Columns, rows: np.ndarray, slots: np.ndarray) -> Distributions:
        """Returns the distributions at recorded ``slots`` [N] of ``rows`` [N] of ``columns``. They come from
        stored hidden states and the teacher's head or, without these, from top-k."""
        layout = self.store.layout
        if layout.hidden_states == "none" or self._replay is None:
            return self._of_top_k(columns, rows, slots)
        z = decoder_input(layout, self._replay, columns, rows, slots)
        logits = (z @ self._replay.decoder_weight.T + self._replay.decoder_bias).double().numpy()
        order = np.argsort(-logits, axis=1, kind="stable")
        p = np.exp(np.take_along_axis(logits, order, axis=1) - logits.max(axis=1, keepdims=True))
        return Distributions(order, p / p.sum(axis=1, keepdims=True))

    def _of_top_k(self, columns: Columns, rows: np.ndarray, slots: np.ndarray) -> Distributions:
        logits = columns["topk_logits"][rows, slots].astype(np.float64)
        temperature_one = self.store.layout.temperatures.index(1.0)
        total = columns["logsumexp"][rows, slots, temperature_one].astype(np.float64)
        p = np.minimum(np.exp(logits - total[:, None]), 1.0)  # float16 may have rounded a logit up
        return Distributions(columns["topk_ids"][rows, slots].astype(np.int64), p)

    @cached_property
    def _replay(self) -> Replay | None:
        """The teacher's top layers and head; None if the teacher has no masked-LM head."""
        return stored_top(self.store)


def show(root: str, split: str, epoch: int, number: int, plot: str | None) -> int:
    """Prints one sample and its task; writes the PNG of kept mass to ``plot``, if given. Returns exit code 0.
    ``number``: index of the sequence among those of all parts of the split, from 0."""
    if plot is not None:
        _refuse_bad_png_path(plot)
    store = open_store(root)
    task, row = _find_sample(store, split, epoch, number)
    view, tokenizer = TaskView(store, split, task), _tokenizer(store)
    print(_sample_text(view, row, number, tokenizer))
    print(_task_text(view))
    if plot is not None:
        from offline_teacher.verification.kept_mass_plot import plot_kept_mass

        storage.publish_bytes(plot, plot_kept_mass(view))
        print(f"plot: {plot}")
    return 0


def _find_sample(store: Store, split: str, epoch: int, number: int) -> tuple[Task, int]:
    """Returns the task of a sample, and the row of the sample in the task."""
    if split not in store.splits:
        raise UserError(f"--split {split}: {store.root} has {' and '.join(store.splits)}")
    plan = store.splits[split].plan
    if not 0 <= number < plan.samples_per_epoch or not 0 <= epoch < plan.masking_epochs:
        raise UserError(
            f"--sample {number} --epoch {epoch}: {store.root} has sequences 0 to {plan.samples_per_epoch - 1}"
            f" and masking epochs 0 to {plan.masking_epochs - 1} of {split}"
        )
    task = plan.task(epoch * plan.tasks_per_epoch)
    while number >= task.samples:
        number -= task.samples
        task = plan.task(task.number + 1)
    return task, number


def _refuse_bad_png_path(path: str) -> None:
    if not path.lower().endswith(".png") or os.path.isdir(path):
        raise UserError(f"--plot {path or repr(path)}: give the name of a file that ends in .png")
    directory = os.path.dirname(os.path.abspath(path))
    if not storage.is_remote(path) and not os.access(directory, os.W_OK):
        raise UserError(f"--plot {path}: {directory} is not a directory in which you may write")


def _tokenizer(store: Store) -> Tokenizer:
    files = store.tokenizer_files()
    try:
        return Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
        reason = "it has no tokenizer.json" if isinstance(error, KeyError) else first_line(error)
        raise UserError(
            f"{store.root}/tokenizer cannot be loaded ({reason}); its files are undamaged, so install the"
            " version of tokenizers that made the store"
        ) from None


def _sample_text(view: TaskView, row: int, number: int, tokenizer: Tokenizer) -> str:
    task, columns = view.task, view.columns(np.array([row]))
    count = int(columns["token_count"][0])
    ids = columns["input_ids"][0, :count].astype(np.int64)
    location = f"part {task.part}, row {task.rows.start + row}"
    title = f"sample {number} of {view.split} ({location}), masking epoch {task.epoch}, {count} tokens"
    lines = [title, tokenizer.decode(ids.tolist(), skip_special_tokens=False), ""]
    if view.store.layout.positions == "pooled":
        vector = columns["embedding"][0].astype(np.float64)
        first = ", ".join(f"{value:.3f}" for value in vector[:POSITIONS])
        lines.append(f"embedding of norm {np.linalg.norm(vector):.4f}: {first}, ...")
    else:
        lines.append(_position_table(view, columns, ids, tokenizer))
    return "\n".join([*lines, ""])


def _position_table(view: TaskView, columns: Columns, ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """Returns a table with one row per masked position or, if nothing is masked, for some positions."""
    layout = view.store.layout
    if layout.masked:
        slots = np.flatnonzero(columns["masked_positions"][0] >= 0)
        positions = columns["masked_positions"][0, slots].astype(np.int64)
        true = columns["masked_labels"][0, slots].tolist()
    else:
        slots = positions = np.unique(np.linspace(0, len(ids) - 1, POSITIONS).astype(np.int64))
        true = ids[positions].tolist()
    recorded = slots if layout.positions == "masked" else positions
    pairs = zip(positions.tolist(), true, strict=True)
    rows = [[p, _token(tokenizer, t), _token(tokenizer, int(ids[p]))] for p, t in pairs]
    headers = ["position", "true", "seen"]
    if view.has_token_distributions:
        predicted = view.distributions(columns, np.zeros(len(recorded), np.int64), recorded)
        k = layout.top_k or SHOWN
        for i, cells in enumerate(rows):
            best = [_token(tokenizer, token) for token in predicted.ids[i, :SHOWN].tolist()]
            # Two spaces separate the tokens, because any other separator may be a token itself.
            top = "  ".join(f"{t} {p:.3f}" for t, p in zip(best, predicted.probabilities[i], strict=False))
            cells += [top, f"{predicted.entropy[i]:.2f}", f"{predicted.tail(k)[i]:.3f}"]
        entropy = "entropy" if predicted.ids.shape[1] == layout.vocab_size else "entropy, at least"
        headers += [f"teacher's top {SHOWN}", entropy, f"tail beyond {k}"]
    else:
        norms = np.linalg.norm(hidden_values(layout, columns)[0, recorded], axis=-1)
        rows = [[*cells, f"{norm:.3f}"] for cells, norm in zip(rows, norms, strict=True)]
        headers.append("norm of the hidden state")
    return table(rows, headers)


def _token(tokenizer: Tokenizer, number: int) -> str:
    """Returns the token of an id, or for example ``id 31000`` if the tokenizer has no such token."""
    token = tokenizer.id_to_token(number)
    return f"id {number}" if token is None else token


def _task_text(view: TaskView) -> str:
    layout, task = view.store.layout, view.task
    names = ["token_count", *(["masked_positions"] if layout.masked else [])]
    columns = BlockReader(view.store, view.split, names).task_rows(task, np.arange(task.samples))
    counts = columns["token_count"]
    rows = [
        ["samples", f"{task.samples:,}"],
        ["tokens", f"{int(counts.sum()):,} ({counts.min()} to {counts.max()} per sample)"],
        ["bytes per token", f"{layout.bytes_per_sample() * task.samples / counts.sum():,.0f}"],
    ]
    if layout.masked:
        rows.append(["masked", f"{int((columns['masked_positions'] >= 0).sum()):,}"])
    if layout.positions != "pooled":
        some = evenly_spaced(task)
        if len(some) < task.samples:
            rows.append(["samples for the next lines", f"{len(some)}, evenly spaced"])
        rows += _teacher_rows(view, view.columns(some))
    environment = view.store.task_index(view.split, task.number).environment
    facts = ", ".join(f"{name} {value}" for name, value in environment.items() if value is not None)
    rows.append(["computed by", facts])
    return f"task {task.name} of {view.split}\n{table(rows, ['', ''])}"


def evenly_spaced(task: Task) -> np.ndarray:
    """Returns the rows of at most ``SAMPLES`` samples of a task."""
    return np.unique(np.linspace(0, task.samples - 1, SAMPLES).astype(np.int64))


def _teacher_rows(view: TaskView, columns: Columns) -> list[list[str]]:
    layout, used, rows = view.store.layout, view.store.layout.used_slots(columns), []
    if layout.top_k:
        top = columns["topk_logits"][..., 0][used].astype(np.float64)
        rows.append(["largest logit", f"mean {top.mean():.2f}, {top.min():.2f} to {top.max():.2f}"])
    for j, temperature in enumerate(layout.temperatures if layout.top_k else ()):
        logits = columns["topk_logits"][used].astype(np.float64) / temperature
        kept = np.exp(logits - columns["logsumexp"][..., j][used][:, None]).sum(axis=1)
        name = f"probability kept by top {layout.top_k} at T = {temperature:g}"
        rows.append([name, f"mean {kept.mean():.3f}, least {kept.min():.3f}"])
    if layout.hidden_states != "none":
        size = np.abs(hidden_values(layout, columns)[used])
        cut = f"input of the top {layout.replay_layers}" if layout.replay_layers else "output of the last"
        name = f"|hidden state|, {cut} {'layers' if layout.replay_layers > 1 else 'layer'}"
        rows.append([name, f"mean {size.mean():.3f}, largest {size.max():.2f}"])
    return rows
