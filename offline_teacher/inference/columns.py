"""Computes a store's columns: hidden states at the cut, pooled embeddings, top-k logits and logsumexp.

The columns of a shard are filled and checked on the device in the store's dtypes. A separate CUDA stream then
copies them to the host while the next shard is computed. The host waits only in ``Pending.wait``.

Axes: n samples of a shard, B batch, L length, M masked positions of a sequence, P recorded positions of a
sequence (P is L or M), N recorded positions of a batch, K top-k, T temperatures, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline_teacher.inference.batches import Batch, Loader, to_device
from offline_teacher.inference.graphs import STEP, GraphedLower
from offline_teacher.inference.quantise import quantise
from offline_teacher.inference.reduction import reduce_logits
from offline_teacher.inference.shard_columns import Pending, ShardColumns, impossible_top_k
from offline_teacher.inference.teacher import LoadedTeacher, logit_dtype
from offline_teacher.models.head import aligned_decoder
from offline_teacher.models.pooling import pool
from offline_teacher.store.schema import Layout

TEXT = ("sequence_id", "token_count", "input_ids", "masked_positions", "masked_labels")
"""The columns that do not come from the teacher."""


def matmul_positions(device_type: str, dtype: torch.dtype) -> int:
    """Returns the number of positions in one product with the output embeddings."""
    if device_type == "cuda":
        return 8192
    return 512 if dtype == torch.float32 else 256  # float32 has more, as each product repacks the weights


class Inference:
    """Runs text through the teacher and computes the columns of ``layout``.

    Without top-k, neither the top layers nor the head run. Only one thread at a time may compute.
    """

    def __init__(self, teacher: LoadedTeacher, layout: Layout) -> None:
        self.teacher, self.layout = teacher, layout
        self._specs = {name: c for name, c in layout.data_columns().items() if name not in TEXT}
        self._decoder: tuple[Tensor, Tensor] | None = None
        self._logits: Tensor | None = None
        on_gpu = teacher.device.type == "cuda"
        self._copying = torch.cuda.Stream(teacher.device) if on_gpu else None
        self._lower = GraphedLower(teacher.lower) if on_gpu else teacher.lower
        self._loader = Loader(layout, teacher.device, STEP if on_gpu else 1)
        self._temperatures = torch.tensor(layout.temperatures, device=teacher.device)

    def batch(
        self, input_ids: np.ndarray, token_count: np.ndarray, masked_positions: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Runs ``columns`` on one batch and waits for the result. Shapes: input_ids [B, L], token_count [B],
        masked_positions [B, M] with -1 in unused slots."""
        text = {"input_ids": input_ids, "token_count": token_count}
        if masked_positions is not None:
            text["masked_positions"] = masked_positions
        return self.columns(text, len(token_count)).wait()

    def columns(self, text: Mapping[str, np.ndarray], batch_size: int) -> Pending:
        """Loads and computes the teacher's columns of a shard from its ``TEXT`` columns."""
        return self.compute(self.load(text, batch_size), len(text["token_count"]))

    def load(self, text: Mapping[str, np.ndarray], batch_size: int) -> list[Batch]:
        """Returns the batches of a shard. Any thread may call this."""
        return self._loader.batches(text, batch_size)

    @torch.inference_mode()
    def compute(self, batches: Iterable[Batch], count: int) -> Pending:
        """Computes the columns of a shard of ``count`` samples from its batches. Unused slots are 0."""
        shard = ShardColumns(self._specs, count, self.teacher.device)
        for batch in batches:
            self._add_batch(shard, batch)
        return shard.copy(self._copying)

    def _add_batch(self, shard: ShardColumns, batch: Batch) -> None:
        ids, counts = self._to_device(batch.input_ids), self._to_device(batch.token_count)
        padded = counts if batch.padded else None
        states = self._lower(ids, padded)  # [B, L, D]
        target = self._to_device(batch.target)
        if self.layout.positions == "pooled":
            assert self.teacher.pooling is not None
            shard.put_embeddings(pool(states, counts, self.teacher.pooling), target)
            return
        source = None if batch.source is None else self._to_device(batch.source)
        if self.layout.hidden_states != "none":
            shard.put(self._hidden_columns(shard, _select(states, source)), target)
        if self.layout.top_k:
            assert self.teacher.top is not None
            last_hidden = self.teacher.top.last_hidden(states, padded)
            shard.put(self._top_k_columns(shard, _select(last_hidden, source)), target)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.teacher.device)

    def _hidden_columns(self, shard: ShardColumns, states: Tensor) -> dict[str, Tensor]:
        """Converts hidden states [N, D] to the store's number format."""
        if self.layout.hidden_states == "int8":
            steps, scale = quantise(states)
            shard.record_impossible(~torch.isfinite(scale))
            return {"hidden_states": steps, "hidden_scale": scale}
        if self.layout.hidden_states == "bfloat16":
            rounded = states.bfloat16()
            shard.record_impossible(~torch.isfinite(rounded))
            return {"hidden_states": rounded.view(torch.int16)}
        return {"hidden_states": shard.to_float16(states)}

    def _top_k_columns(self, shard: ShardColumns, last_hidden: Tensor) -> dict[str, Tensor]:
        """Computes topk_ids [N, K], topk_logits [N, K], logsumexp [N, T] from last hidden states [N, D]."""
        top = self.teacher.top
        assert top is not None
        if self._decoder is None or self._logits is None:
            self._decoder = self._logit_weights()
            # One buffer is reused, as allocating it for every chunk would take as long as a forward pass.
            positions = matmul_positions(self.teacher.device.type, self.teacher.dtype)
            self._logits = self._decoder[1].new_empty(positions, len(self._decoder[0]))
        weight, bias = self._decoder
        pieces = []
        for chunk in last_hidden.split(len(self._logits)):
            logits = self._logits[: len(chunk)]
            wider: Any = {} if bias.dtype == weight.dtype else {"out_dtype": bias.dtype}
            torch.addmm(bias, top.decoder_input(chunk), weight.t(), out=logits, **wider)
            unpadded = logits[:, : self.layout.vocab_size]
            ids, values, sums = reduce_logits(unpadded, self.layout.top_k, self.layout.temperatures)
            values = values.half()
            shard.record_impossible(
                impossible_top_k(ids, values, sums, self._temperatures, self.layout.vocab_size)
            )
            pieces.append((ids, values, sums))
        names = "topk_ids", "topk_logits", "logsumexp"
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*pieces, strict=True), strict=True)}

    def _logit_weights(self) -> tuple[Tensor, Tensor]:
        """Returns the output embeddings, and their bias in the dtype of the logits."""
        assert self.teacher.top is not None
        weight, bias = aligned_decoder(self.teacher.top.decoder_weight, self.teacher.top.decoder_bias)
        return weight, bias.to(logit_dtype(self.teacher.device.type, self.teacher.dtype))


def _select(states: Tensor, source: Tensor | None) -> Tensor:
    """Returns the vectors [N, D] of ``states`` [B, L, D] at flat indices ``source`` [N]; None for all."""
    flat = states.flatten(0, 1)
    return flat if source is None else flat[source]
