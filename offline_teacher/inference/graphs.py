"""The encoder below the cut as CUDA graphs: one launch a batch instead of some hundred, the same kernels.

A graph belongs to one shape. There are few: rows come sorted by length, lengths are rounded up to a multiple
of ``STEP``, and all batches of a shard but its last have the same number of rows.

Axes: B batch, L length, D hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from offline_teacher.families import family_of
from offline_teacher.families.split import Lower

STEP = 64
"""Positions that a batch's length is rounded up to a multiple of."""
MOST_GRAPHS = 8
"""Graphs kept; other shapes run operation by operation."""
NO_MASK = "sdpa_without_mask"
"""transformers' name, once registered, for its own attention where every position is visible."""

AttentionInterface.register(NO_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(NO_MASK, lambda *_, **__: None)

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]


@dataclass(frozen=True)
class _Graph:
    """What was captured, with the memory that it reads and writes."""

    input_ids: Tensor
    token_count: Tensor | None
    hidden: Tensor
    replay: Replay


def cuda_graph(function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """The tensor that ``function`` returns, and what computes it again in the same memory."""
    graph = torch.cuda.CUDAGraph()
    # Meanwhile other threads write shards and allocate pinned memory.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay


class GraphedLower:
    """Calls as `Lower` does. What it returns is overwritten by its next call."""

    def __init__(self, lower: Lower, capture: Capture = cuda_graph) -> None:
        self._lower, self._capture = lower, capture
        self._seen: set[tuple[int, int, bool]] = set()
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._room = MOST_GRAPHS

    def __call__(self, input_ids: Tensor, token_count: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] of int64 ids [B, L]; see `Lower`."""
        B, L = input_ids.shape  # noqa: N806 - the field's axis letters
        shape = (B, L, token_count is None)
        if shape not in self._graphs:
            again = shape in self._seen  # a shape that comes once is not worth a graph
            self._seen.add(shape)
            if not (again and self._room and self._add(shape, input_ids, token_count)):
                return self._run(input_ids, token_count)
        graph = self._graphs[shape]
        graph.input_ids.copy_(input_ids)
        if graph.token_count is not None and token_count is not None:
            graph.token_count.copy_(token_count)
        graph.replay()
        return graph.hidden

    def _run(self, input_ids: Tensor, token_count: Tensor | None) -> Tensor:
        with _no_mask(self._lower.encoder, input_ids, token_count):
            hidden: Tensor = self._lower(input_ids, token_count)
        return hidden

    def _add(self, shape: tuple[int, int, bool], input_ids: Tensor, token_count: Tensor | None) -> bool:
        """Captures a graph of this shape; False where the encoder cannot be captured."""
        ids, count = input_ids.clone(), None if token_count is None else token_count.clone()
        try:
            hidden, replay = self._capture(lambda: self._run(ids, count))
        except RuntimeError as error:  # an operation that no graph can hold
            self._room = 0
            reason = "".join(str(error).strip().splitlines()[:1])
            warnings.warn(
                f"the teacher runs without CUDA graphs, slower: {reason}", RuntimeWarning, stacklevel=2
            )
            return False
        self._graphs[shape] = _Graph(ids, count, hidden, replay)
        self._room -= 1
        return True


@contextmanager
def _no_mask(encoder: Any, input_ids: Tensor, token_count: Tensor | None) -> Iterator[None]:
    """Within, transformers makes no attention mask where no row is padded.

    It makes none by itself, but before version 5.23 not while a graph is captured: there it makes one, and
    attention with a mask has slower kernels. Masks of a family's own are left alone.
    """
    config, attention = encoder.config, encoder.config._attn_implementation
    length, device = input_ids.shape[1], input_ids.device
    own = family_of(config).attention_mask(config, None, length, device, encoder.dtype)
    if token_count is not None or own is not None or attention != "sdpa":
        yield
        return
    config._attn_implementation = NO_MASK
    try:
        yield
    finally:
        config._attn_implementation = attention
