"""Fine-tunes only the word embeddings of tokens that occur in the training set.

Half of a small encoder's parameters are word embeddings, and most tokens do not occur in a task's training
set. Without weight decay, AdamW never changes an embedding whose gradient is zero at every step. Leaving such
embeddings out gives the same result and saves work in the backward pass, gradient clipping and the optimiser.

Axes: V tokens of the vocabulary, U tokens that occur in the training set, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def reduced_vocabulary(model: Any, input_ids: list[list[int]], pad_id: int) -> Iterator[list[list[int]]]:
    """Replaces the model's embeddings [V, D] by those [U, D] of the tokens in ``input_ids``.

    Yields ``input_ids`` renumbered accordingly. Ids from 0 to the padding's keep their numbers, because
    RoBERTa derives positions from the padding's id. On exit the model has its embeddings [V, D] again, and
    the U rows in them have their trained values.
    """
    full = model.get_input_embeddings()
    kept = max(pad_id, full.padding_idx or 0) + 1
    used = np.unique(np.concatenate([np.arange(kept), *(np.asarray(row) for row in input_ids)]))
    rows = torch.from_numpy(used).to(full.weight.device)
    weight = full.weight.detach()[rows]
    reduced = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=full.padding_idx)
    model.set_input_embeddings(reduced)
    try:
        yield [np.searchsorted(used, row).tolist() for row in input_ids]
    finally:
        with torch.no_grad():
            full.weight[rows] = reduced.weight
        model.set_input_embeddings(full)
