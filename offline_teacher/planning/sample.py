"""The sequences that ``plan`` runs through the teacher, and the hidden states of each form of store for them.

Axes: n sequences, L length, M masked positions, N positions looked at, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.settings.recipe import Recipe
from offline_teacher import preflight
from offline_teacher.corpus.sample import CorpusSample
from offline_teacher.models.loading import load_model
from offline_teacher.models.recording import QueriesKeysValues
from offline_teacher.models.replay import Replay
from offline_teacher.models.split import Lower, lower
from offline_teacher.models.students import choose_layers, new_student, student_config, student_weights
from offline_teacher.models.weights import named_weights, top_weights
from offline_teacher.planning.soft_targets import DenseHead, as_stored, hidden_name, relation_gradient
from offline_teacher.sequences.masking import MaskVocab, mask_sequences, mask_vocab
from offline_teacher.sequences.tokenizer import Encoder
from offline_teacher.source import Source

MASS_POSITIONS = 1024
"""Of each kind, masked and unmasked."""
GRADIENT_POSITIONS = 512
RELATION_SEQUENCES = 8
SAMPLE_TOKENS = 1 << 14
"""At most this many run through the teacher in float32."""
STORED = ("int8", "float16")
"""What hidden states are stored in."""


@dataclass(frozen=True)
class Sequences:
    """Masked sequences of the sample, in random order: what run through the teacher would be."""

    input_ids: np.ndarray
    """[n, L]"""
    positions: np.ndarray
    """[n, M] the masked ones; -1: unused. M = 0: masking is off."""
    token_count: np.ndarray
    """[n]"""

    def rows(self, chosen: Any) -> Sequences:
        return Sequences(self.input_ids[chosen], self.positions[chosen], self.token_count[chosen])


def masked_sample(recipe: Recipe, source: Source, encoder: Encoder, sample: CorpusSample) -> Sequences:
    """All sequences of the sample, shuffled (its places are in order), masked as in masking epoch 0.

    Those of unknown tokens alone, where nothing is masked, come last.
    """
    order = np.random.default_rng(0).permutation(len(sample.input_ids))
    input_ids, token_count = sample.input_ids[order], sample.token_count[order]
    masking = recipe.masking
    if not masking.probability:
        return Sequences(input_ids, np.zeros((len(order), 0), np.int16), token_count)
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


def needed(sequences: Sequences) -> int:
    """How many sequences have enough masked positions and not too many tokens."""
    tokens = sequences.token_count.astype(np.int64).cumsum()
    most = int(np.searchsorted(tokens, SAMPLE_TOKENS, side="right"))
    if not sequences.positions.shape[1]:
        return max(1, min(most, int(np.searchsorted(tokens, MASS_POSITIONS)) + 1))
    masked = (sequences.positions >= 0).sum(axis=1).cumsum()
    return max(1, min(int(np.searchsorted(masked, MASS_POSITIONS)) + 1, most))


def kinds_of_positions(sequences: Sequences, kl_positions: str) -> dict[str, np.ndarray]:
    """Flat positions of the sequences [n L] that are compared: purpose -> positions."""
    real = np.arange(sequences.input_ids.shape[1]) < sequences.token_count[:, None]
    masked = np.zeros_like(real)
    row, slot = np.nonzero(sequences.positions >= 0)
    masked[row, sequences.positions[row, slot]] = True
    learnt = masked if kl_positions == "masked" and masked.any() else real
    return {
        "masked": _choose(masked, MASS_POSITIONS),
        "unmasked": _choose(real & ~masked, MASS_POSITIONS),
        "gradient": _choose(learnt, GRADIENT_POSITIONS),
    }


def _choose(wanted: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of the positions [n, L] that are True, flat, ascending."""
    (flat,) = np.nonzero(wanted.ravel())
    return np.sort(np.random.default_rng(1).permutation(flat)[:count])


class Knowledge:
    """The teacher in float32 on the CPU, and what each form of store would keep of it on these sequences.

    A store keeps what the teacher gives in the recipe's dtype.
    """

    def __init__(self, recipe: Recipe, source: Source, sequences: Sequences) -> None:
        """UserError where hidden states of the teacher, in float32 or as it is run, are not finite."""
        assert recipe.teacher is not None
        self.recipe, self.sequences, self.config = recipe, sequences, source.config
        self._model = load_model(source.directory, source.config)
        own = recipe.store.replay_layers
        depth = source.config.num_hidden_layers
        self.depths = sorted({n for n in (0, 1, own) if n <= depth})
        self._states = {n: self._run(lower(self._model, n), "float32") for n in self.depths}
        self._as_run, dtype = self._states, recipe.teacher.dtype
        if dtype != "float32":
            model = load_model(source.directory, source.config)  # another: a cut model shares its parameters
            model.to(getattr(torch, dtype))
            self._as_run = {n: self._run(lower(model, n), dtype) for n in self.depths}
        self._replays = {n: Replay(source.config, top_weights(self._model, n), n) for n in self.depths}
        run = next(iter(recipe.runs().values()))
        self.student_layers = choose_layers(run.student.layers, source.config)

    @cached_property
    def head(self) -> DenseHead:
        return DenseHead(self._model)

    def last_hidden(self, positions: np.ndarray) -> Tensor:
        """The teacher's last hidden states float32 [N, D] at flat positions."""
        return self._states[0].flatten(0, 1)[torch.from_numpy(positions)]

    def forms(self, positions: np.ndarray) -> Iterator[tuple[str, Tensor]]:
        """Name of a form of hidden states -> the last ones float32 [N, D] that training takes from it."""
        for n, states in self._as_run.items():
            for stored in STORED:
                yield hidden_name(stored, n), self._replayed(as_stored(states, stored), n, positions)

    def student_hidden(self, positions: np.ndarray) -> Tensor:
        """Last hidden states float32 [N, D] of a student before its first step, of the teacher's width."""
        if self._starts_as_teacher:
            return self.last_hidden(positions)
        return self._run(lower(self._student, 0), "float32").flatten(0, 1)[torch.from_numpy(positions)]

    @property
    def _starts_as_teacher(self) -> bool:
        return len(self.student_layers) == self.config.num_hidden_layers

    def relation_error(self) -> dict[str, Any] | None:
        """Relative error of the gradient of MiniLMv2's relations, by form of hidden states.

        None where the student starts as its teacher, whose gradient is zero.

        The gradient is with respect to queries, keys and values of the student's last layer at its start.
        """
        if self._starts_as_teacher:
            return None
        ids, count = self._batch(slice(0, RELATION_SEQUENCES))
        with torch.no_grad(), QueriesKeysValues(self._student) as recorder:
            lower(self._student, 0)(ids, count)
            own = recorder.take()
        heads = max(n for n in range(1, 65) if self.config.hidden_size % n == 0)
        replay = self._replays[max(n for n in self.depths if n)]
        n, few = replay.replay_layers, slice(0, RELATION_SEQUENCES)
        exact, states = self._states[n][few], self._as_run[n][few]
        truth = relation_gradient(own, replay.queries_keys_values(exact, count), count, heads)
        errors = {}
        for stored in STORED:
            found = replay.queries_keys_values(as_stored(states, stored), count)
            difference = relation_gradient(own, found, count, heads) - truth
            errors[hidden_name(stored, replay.replay_layers)] = float(difference.norm() / truth.norm())
        return {"heads": heads, "errors": errors}

    @cached_property
    def _student(self) -> Any:
        config = student_config(self.config, self.student_layers, dropout=0.0)
        weights = {name: tensor.float() for name, tensor in named_weights(self._model).items()}
        start = student_weights(self.config, weights, self.student_layers)
        return new_student(config, start, head=False).eval()

    @torch.no_grad()
    def _run(self, encoder: Lower, dtype: str) -> Tensor:
        """float32 [n, L, D] of all sequences."""
        assert self.recipe.teacher is not None
        size, pieces = self.recipe.teacher.batch_size, []
        for start in range(0, len(self.sequences.token_count), size):
            pieces.append(encoder(*self._batch(slice(start, start + size))).float())
        states = torch.cat(pieces)
        if not bool(states.isfinite().all()):
            raise preflight.not_finite(self.recipe, dtype)
        return states

    def _batch(self, rows: slice) -> tuple[Tensor, Tensor]:
        batch = self.sequences.rows(rows)
        ids, count = (values.astype(np.int64) for values in (batch.input_ids, batch.token_count))
        return torch.from_numpy(ids), torch.from_numpy(count)

    @torch.no_grad()
    def _replayed(self, states: Tensor, replay_layers: int, positions: np.ndarray) -> Tensor:
        _, count = self._batch(slice(None))
        last = self._replays[replay_layers].last_hidden(states, count)
        return last.flatten(0, 1)[torch.from_numpy(positions)]
