"""The text of a store: parts of token ids before masking."""

from __future__ import annotations

from typing import Any

import numpy as np

from infra.cache import Cache
from offline_teacher.store.index import PartIndex


def publish_part(
    root: str,
    split: str,
    part: int,
    input_ids: np.ndarray,
    token_count: np.ndarray,
    facts: dict[str, Any],
    counts: np.ndarray | None = None,
) -> PartIndex:
    """Publishes the rows of a part, then its index.

    ``input_ids`` [rows, L] in the store's id dtype, ``token_count`` uint16 [rows]. ``facts``: text,
    made_from, documents, text_bytes, problems of ``PartIndex``. ``counts``: int64 [V], how often each token
    occurs, if masking is by frequency.
    """
    raise NotImplementedError


def read_part_index(root: str, split: str, part: int) -> PartIndex | None:
    """None if the part is not there. UserError if its index is damaged."""
    raise NotImplementedError


def read_part(root: str, index: PartIndex, cache: Cache | None = None) -> tuple[np.ndarray, np.ndarray]:
    """``input_ids`` [rows, L] and ``token_count`` [rows] of a part, checked against its index."""
    raise NotImplementedError


def read_counts(root: str, index: PartIndex) -> tuple[np.ndarray, np.ndarray]:
    """Tokens uint32 and how often each occurs int64."""
    raise NotImplementedError
