"""Runs the encoder below the cut as CUDA graphs: one launch per batch instead of hundreds of kernel launches.

Each graph is for one shape of the batch. There are few shapes, because sequences are sorted by length, the
length of a batch is a multiple of ``STEP``, and all batches of a shard but the last have the same size.

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
from offline_teacher.models.split import Lower

STEP = 64
"""The length of a batch is rounded up to a multiple of this."""
MOST_GRAPHS = 8
"""Largest number of graphs. Batches of other shapes run without a graph."""
NO_MASK = "sdpa_without_mask"
"""Name under which the SDPA attention of transformers is registered without a mask."""

AttentionInterface.register(NO_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(NO_MASK, lambda *_, **__: None)

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]


@dataclass(frozen=True)
class _Graph:
    """A captured graph and the tensors that it reads and writes."""

    input_ids: Tensor
    token_count: Tensor | None
    hidden: Tensor
    replay: Replay


def cuda_graph(function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """Captures ``function``. Returns its result, and a function that recomputes it in the same memory."""
    graph = torch.cuda.CUDAGraph()
    # The mode is thread-local, because other threads write shards and allocate pinned memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay


class GraphedLower:
    """Has the interface of `Lower`, but each call overwrites the result of the previous call."""

    def __init__(self, lower: Lower, capture: Capture = cuda_graph) -> None:
        self._lower, self._capture = lower, capture
        self._seen: set[tuple[int, int, bool]] = set()
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._graphs_left = MOST_GRAPHS

    def __call__(self, input_ids: Tensor, token_count: Tensor | None = None) -> Tensor:
        """Returns hidden states [B, L, D] of int64 ids [B, L]; see `Lower`."""
        B, L = input_ids.shape  # noqa: N806 - the field's axis letters
        shape = (B, L, token_count is None)
        if shape not in self._graphs:
            repeated = shape in self._seen  # a shape that occurs once is not worth a graph
            self._seen.add(shape)
            if not (repeated and self._graphs_left and self._add_graph(shape, input_ids, token_count)):
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

    def _add_graph(self, shape: tuple[int, int, bool], input_ids: Tensor, token_count: Tensor | None) -> bool:
        """Captures a graph of this shape. Returns False, and warns, if the encoder cannot be captured."""
        ids, count = input_ids.clone(), None if token_count is None else token_count.clone()
        try:
            hidden, replay = self._capture(lambda: self._run(ids, count))
        except RuntimeError as error:  # an operation that cannot be captured
            self._graphs_left = 0
            reason = "".join(str(error).strip().splitlines()[:1])
            what = f"the teacher runs without CUDA graphs, slower: {reason}"
            warnings.warn(what, RuntimeWarning, stacklevel=2)
            return False
        self._graphs[shape] = _Graph(ids, count, hidden, replay)
        self._graphs_left -= 1
        return True


@contextmanager
def _no_mask(encoder: Any, input_ids: Tensor, token_count: Tensor | None) -> Iterator[None]:
    """Context in which transformers makes no attention mask if no sequence of the batch is padded.

    Before version 5.23, transformers always makes a mask while a graph is captured, and attention with a mask
    has slower kernels. A family that defines its own mask keeps this mask.
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
