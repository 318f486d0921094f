"""Runs sampled sequences through the teacher, and rounds states as each form of store that ``plan`` compares.

Axes: n sequences, L length, M masked positions, N compared positions, D hidden size.
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
from offline_teacher.inputs.source import Source
from offline_teacher.models.loading import load_model
from offline_teacher.models.recording import QueriesKeysValues
from offline_teacher.models.replay import Replay
from offline_teacher.models.split import Lower, lower_part
from offline_teacher.models.students import choose_layers, new_student, student_config, student_weights
from offline_teacher.models.weights import named_weights, top_weights
from offline_teacher.planning import preflight
from offline_teacher.planning.soft_targets import DenseHead, form_name, relation_gradient, round_as_stored
from offline_teacher.sequences.masking import mask_sequences, mask_vocab
from offline_teacher.sequences.sample import CorpusSample
from offline_teacher.sequences.tokenizer import Encoder

MASS_POSITIONS = 1024
"""Largest number of masked, and of unmasked, positions for kept mass (probability of the top k tokens)."""
GRADIENT_POSITIONS = 512
"""Largest number of positions at which gradients are compared."""
RELATION_SEQUENCES = 8
"""Number of sequences for which the gradient of the relations is computed."""
SAMPLE_TOKENS = 1 << 14
"""Largest number of tokens that run through the teacher in float32."""
STORED_FORMATS = ("int8", "float16")
"""Number formats of stored hidden states that are compared."""


@dataclass(frozen=True)
class MaskedSequences:
    """Sequences of the sample in random order, masked as in a pass."""

    input_ids: np.ndarray
    """Token ids [n, L]."""
    positions: np.ndarray
    """Masked positions [n, M], with -1 in unused slots. M is 0 if masking is off."""
    token_count: np.ndarray
    """Number of tokens of each sequence [n]."""

    def rows(self, chosen: Any) -> MaskedSequences:
        """Selects sequences by a slice or an index array."""
        return MaskedSequences(self.input_ids[chosen], self.positions[chosen], self.token_count[chosen])


def masked_sequences(
    recipe: Recipe, source: Source, encoder: Encoder, sample: CorpusSample
) -> MaskedSequences:
    """Shuffles the sequences and masks them as in masking epoch 0; those without a masked token come last."""
    order = np.random.default_rng(0).permutation(len(sample.input_ids))
    input_ids, token_count = sample.input_ids[order], sample.token_count[order]
    masking = recipe.masking
    if not masking.probability:
        return MaskedSequences(input_ids, np.zeros((len(order), 0), np.int16), token_count)
    counts = np.bincount(input_ids.ravel(), minlength=encoder.vocab_size)
    counts[list(encoder.special_ids)] = 0
    vocab = mask_vocab(masking, source.tokenizer.mask_token_id, encoder, counts)
    masked = mask_sequences(input_ids, token_count, np.arange(len(order)), 0, masking, vocab)
    sequences = MaskedSequences(masked.input_ids, masked.positions, token_count)
    return sequences.rows(np.argsort(masked.positions[:, 0] < 0, kind="stable"))


def sequences_needed(sequences: MaskedSequences) -> int:
    """Returns the number of leading sequences that together have ``MASS_POSITIONS`` masked positions
    (positions of any kind if masking is off), but at most ``SAMPLE_TOKENS`` tokens; at least 1."""
    tokens = sequences.token_count.astype(np.int64).cumsum()
    limit = int(np.searchsorted(tokens, SAMPLE_TOKENS, side="right"))
    if not sequences.positions.shape[1]:
        return max(1, min(limit, int(np.searchsorted(tokens, MASS_POSITIONS)) + 1))
    masked = (sequences.positions >= 0).sum(axis=1).cumsum()
    return max(1, min(int(np.searchsorted(masked, MASS_POSITIONS)) + 1, limit))


def compared_positions(sequences: MaskedSequences, kl_positions: str) -> dict[str, np.ndarray]:
    """Chooses the flat positions for kept mass (``masked``, ``unmasked``) and for gradients.

    They index the flattened [n * L]. If ``kl_positions`` is ``masked``, gradients are compared at these only.
    """
    real = np.arange(sequences.input_ids.shape[1]) < sequences.token_count[:, None]
    masked = np.zeros_like(real)
    row, slot = np.nonzero(sequences.positions >= 0)
    masked[row, sequences.positions[row, slot]] = True
    kl_allowed = masked if kl_positions == "masked" and masked.any() else real
    return {
        "masked": _choose(masked, MASS_POSITIONS),
        "unmasked": _choose(real & ~masked, MASS_POSITIONS),
        "gradient": _choose(kl_allowed, GRADIENT_POSITIONS),
    }


def _choose(allowed: np.ndarray, count: int) -> np.ndarray:
    """Draws at most ``count`` flat indices of True entries of ``allowed`` [n, L]; returns them ascending."""
    (flat,) = np.nonzero(allowed.ravel())
    return np.sort(np.random.default_rng(1).permutation(flat)[:count])


class SampledTeacher:
    """Hidden states of the teacher on some sequences, exact in float32 and as each form of store has them.

    The teacher runs on the CPU. Stored hidden states come from the teacher in the recipe's dtype.
    """

    def __init__(self, recipe: Recipe, source: Source, sequences: MaskedSequences) -> None:
        """Raises UserError if hidden states in float32 or in the recipe's dtype are not finite."""
        assert recipe.teacher is not None
        self.recipe, self.sequences, self.config = recipe, sequences, source.config
        self._batch_size = recipe.teacher.batch_size
        self._model = load_model(source.directory, source.config)
        depth = source.config.num_hidden_layers
        self.replay_depths = sorted({n for n in (0, 1, recipe.store.replay_layers) if n <= depth})
        self._states = {n: self._run(lower_part(self._model, n), "float32") for n in self.replay_depths}
        self._states_as_run, dtype = self._states, recipe.teacher.dtype
        if dtype != "float32":
            model = load_model(source.directory, source.config)  # self._model stays float32: head, replays
            model.to(getattr(torch, dtype))
            self._states_as_run = {n: self._run(lower_part(model, n), dtype) for n in self.replay_depths}
        self._replays = {n: Replay(source.config, top_weights(self._model, n), n) for n in self.replay_depths}
        run = next(iter(recipe.runs().values()))
        self.student_layers = choose_layers(run.student.layers, source.config)

    @cached_property
    def head(self) -> DenseHead:
        return DenseHead(self._model)

    def last_hidden(self, positions: np.ndarray) -> Tensor:
        """Returns the teacher's last hidden states, float32 [N, D], at flat positions [N]."""
        return self._states[0].flatten(0, 1)[torch.from_numpy(positions)]

    def stored_forms(self, positions: np.ndarray) -> Iterator[tuple[str, Tensor]]:
        """Yields (name of a stored form, last hidden states, float32 [N, D], that are replayed from it)."""
        _, count = self._batch(slice(None))
        for n, states in self._states_as_run.items():
            for stored in STORED_FORMATS:
                last = self._replays[n].last_hidden(round_as_stored(states, stored), count)
                yield form_name(stored, n), last.flatten(0, 1)[torch.from_numpy(positions)]

    def student_hidden(self, positions: np.ndarray) -> Tensor:
        """Returns last hidden states, float32 [N, D], of a student of full width before its first step."""
        if self._starts_as_teacher:
            return self.last_hidden(positions)
        return self._run(lower_part(self._student, 0), "float32").flatten(0, 1)[torch.from_numpy(positions)]

    @property
    def _starts_as_teacher(self) -> bool:
        return len(self.student_layers) == self.config.num_hidden_layers

    def relation_error(self) -> dict[str, Any] | None:
        """Returns the relative error of the gradient of MiniLMv2's relations for each form of hidden states.

        The gradient is with respect to queries, keys and values of the student's last layer before its first
        step. None if the student is identical to its teacher at the start, because the gradient is then zero.
        """
        if self._starts_as_teacher:
            return None
        ids, count = self._batch(slice(0, RELATION_SEQUENCES))
        with torch.no_grad(), QueriesKeysValues(self._student) as recorder:
            lower_part(self._student, 0)(ids, count)
            own = recorder.take()
        heads = max(n for n in range(1, 65) if self.config.hidden_size % n == 0)
        # The recipe's replay_layers, or 1 if that is 0: relations need a replayed layer.
        replay = self._replays[max(n for n in self.replay_depths if n)]
        n, rows = replay.replay_layers, slice(0, RELATION_SEQUENCES)
        exact, states = self._states[n][rows], self._states_as_run[n][rows]
        truth = relation_gradient(own, replay.queries_keys_values(exact, count), count, heads)
        errors = {}
        for stored in STORED_FORMATS:
            replayed = replay.queries_keys_values(round_as_stored(states, stored), count)
            difference = relation_gradient(own, replayed, count, heads) - truth
            errors[form_name(stored, n)] = float(difference.norm() / truth.norm())
        return {"heads": heads, "errors": errors}

    @cached_property
    def _student(self) -> Any:
        config = student_config(self.config, self.student_layers, dropout=0.0)
        weights = {name: tensor.float() for name, tensor in named_weights(self._model).items()}
        start = student_weights(self.config, weights, self.student_layers)
        return new_student(config, start, head=False).eval()

    @torch.no_grad()
    def _run(self, encoder: Lower, dtype: str) -> Tensor:
        """Returns the hidden states of all sequences, float32 [n, L, D]. UserError if one is not finite."""
        size, pieces = self._batch_size, []
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
