"""Fine-tuning the word embeddings of a task's own tokens alone.

Half of a small encoder's parameters are word embeddings, and most tokens occur nowhere in a task's training
set. Without weight decay, AdamW never changes a row whose gradient is zero at every step. Leaving these rows
out gives the same result and saves work in the optimiser, the clipping and the gradients.

Axes: V vocabulary, U tokens that occur, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def only_tokens_of(model: Any, input_ids: list[list[int]], pad_id: int) -> Iterator[list[list[int]]]:
    """Within it ``model`` has the embeddings [U, D] of the tokens in ``input_ids``; yields these, renumbered.

    Ids up to the padding's keep their number: RoBERTa tells positions by it. Afterwards the model has its
    whole embeddings [V, D] again, with what the U rows have become.
    """
    whole = model.get_input_embeddings()
    kept = max(pad_id, whole.padding_idx or 0) + 1
    used = np.unique(np.concatenate([np.arange(kept), *(np.asarray(row) for row in input_ids)]))
    rows = torch.from_numpy(used).to(whole.weight.device)
    few = nn.Embedding.from_pretrained(
        whole.weight.detach()[rows], freeze=False, padding_idx=whole.padding_idx
    )
    model.set_input_embeddings(few)
    try:
        yield [np.searchsorted(used, row).tolist() for row in input_ids]
    finally:
        with torch.no_grad():
            whole.weight[rows] = few.weight
        model.set_input_embeddings(whole)
