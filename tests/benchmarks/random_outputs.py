"""Makes one set of random teacher outputs with the distributions of a BERT-base teacher's.

Axes: n samples, L length, P = L recorded positions, K top-k, T temperatures, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_ndtr, ndtri

from offline_teacher.store.schema import Columns, Layout
from tests.benchmarks.full_sequences import full_text

LOGIT_DEVIATION = 3.0
"""Standard deviation of a position's logits over the vocabulary. The largest of 30,522 is then about 12."""


def make_outputs(layout: Layout, samples: int, seed: int = 0) -> Columns:
    """Returns column name -> array [samples, *shape] of ``layout.data_columns()``. Text and ids have the
    layout's dtypes. Logits, logsumexp and hidden states are float32, as a teacher computes them."""
    random = np.random.default_rng(seed)
    columns = {
        name: np.zeros((samples, *column.shape), column.dtype)
        for name, column in layout.data_columns().items()
        if name not in ("topk_ids", "topk_logits", "logsumexp", "hidden_states", "hidden_scale")
    }
    columns["sequence_id"][:] = np.arange(samples)
    full_text(layout, columns, random)
    if layout.top_k:
        columns |= _topk(layout, samples, random)
    if layout.hidden_states != "none":
        columns["hidden_states"] = _hidden_states(layout, samples, random)
    return columns


def _hidden_states(layout: Layout, samples: int, random: np.random.Generator) -> np.ndarray:
    """Returns float32 [n, P, D] of order 1. Every dimension has its own mean and deviation, as those of a
    trained encoder have."""
    mean = random.normal(0, 0.3, layout.hidden_size).astype(np.float32)
    deviation = np.exp(random.normal(-0.5, 0.4, layout.hidden_size)).astype(np.float32)
    states = random.standard_normal((samples, layout.length, layout.hidden_size), np.float32)
    states *= deviation
    states += mean
    return states


def _topk(layout: Layout, samples: int, random: np.random.Generator) -> Columns:
    """Returns the top K of V independent normal logits per position, descending, with their ids and the
    logsumexp at every temperature. The ids are distinct, and frequent words have low ids."""
    V, K, shape = layout.vocab_size, layout.top_k, (samples, layout.length)  # noqa: N806
    # The K smallest of V uniform numbers, in order: sums of exponential numbers over their total.
    sums = np.cumsum(random.standard_exponential((*shape, K)), axis=-1)
    smallest = sums / (sums[..., -1:] + random.gamma(V + 1 - K, size=(*shape, 1)))
    logits = -LOGIT_DEVIATION * ndtri(smallest)
    ids = np.sort((random.random((*shape, K)) ** 3 * (V - K)).astype(np.int64), axis=-1) + np.arange(K)
    logsumexp = np.stack([_logsumexp(logits, V, T) for T in layout.temperatures], axis=-1)
    return {
        "topk_ids": random.permuted(ids, axis=-1).astype(layout.id_dtype),
        "topk_logits": logits.astype(np.float32),
        "logsumexp": logsumexp.astype(np.float32),
    }


def _logsumexp(logits: np.ndarray, vocabulary: int, temperature: float) -> np.ndarray:
    """Returns log(sum over V of exp(logit / T)), float64 [n, P], from the top K logits [n, P, K]. The other
    V - K logits count with the expectation of normal logits below the smallest of the K."""
    top = np.log(np.exp(logits / temperature).sum(axis=-1))
    smallest, shift = logits[..., -1] / LOGIT_DEVIATION, LOGIT_DEVIATION / temperature
    rest = shift**2 / 2 + log_ndtr(smallest - shift) - log_ndtr(smallest)
    return np.logaddexp(top, rest + math.log(vocabulary - logits.shape[-1]))
