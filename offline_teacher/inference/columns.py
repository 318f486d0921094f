"""Computes a store's columns: hidden states at the cut, pooled embeddings, top-k logits and logsumexp.

The columns of a shard are filled on the device in the store's dtypes. A separate CUDA stream then copies them
to the host while the next shard is computed. The host waits for the device only in ``Pending.wait``.

Axes: n samples of a shard, B batch, L length, M masked positions of a sequence, P recorded positions of a
sequence (P is L or M), N recorded positions of a batch, K top-k, T temperatures, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infra.errors import UserError
from offline_teacher.inference.graphs import STEP, GraphedLower
from offline_teacher.inference.quantise import quantise
from offline_teacher.inference.reduction import reduce_logits
from offline_teacher.inference.teacher import LoadedTeacher
from offline_teacher.models.head import aligned_decoder
from offline_teacher.models.pooling import pool
from offline_teacher.store.schema import Column, Layout

LARGEST_FLOAT16 = 65504.0
TEXT = ("sequence_id", "token_count", "input_ids", "masked_positions", "masked_labels")
"""The columns that do not come from the teacher."""
DTYPES = {"u2": torch.int16, "u4": torch.int32, "f2": torch.float16, "f4": torch.float32, "i1": torch.int8}
"""Column dtype -> dtype on the device; signed integers of the same size replace unsigned ones."""


def matmul_positions(device_type: str, dtype: torch.dtype) -> int:
    """Returns the number of positions in one product with the output embeddings."""
    if device_type == "cuda":
        return 8192
    return 512 if dtype == torch.float32 else 256  # float32 has more, as each product repacks the weights


@dataclass(frozen=True)
class Pending:
    """Columns that are being copied to the host."""

    tensors: Mapping[str, Tensor]
    specs: Mapping[str, Column]
    largest: Tensor
    """Largest magnitude among the values that were converted to float16."""
    copy_done: torch.cuda.Event | None
    """Event at the end of the copy; None on a CPU."""
    source: object = None
    """The columns on the device. This reference keeps them alive during the copy."""

    def wait(self) -> dict[str, np.ndarray]:
        """Returns arrays [n, ...] in the store's dtypes. Raises UserError if a number exceeds float16."""
        if self.copy_done is not None:
            self.copy_done.synchronize()
        if float(self.largest) > LARGEST_FLOAT16:  # NaN passes; the store's checks find it
            raise UserError(
                "store.hidden_states: float16 cannot hold this teacher's hidden states, the largest of which"
                f" is {float(self.largest):.3g}; set store.hidden_states: bfloat16, or int8"
            )
        return {name: tensor.numpy().view(self.specs[name].dtype) for name, tensor in self.tensors.items()}


class Inference:
    """Runs text through the teacher and computes the columns of ``layout``.

    Without top-k, neither the top layers nor the head run. Logits have the teacher's dtype; their logsumexp
    is accumulated in float32. Only one thread may use an instance at a time.
    """

    def __init__(self, teacher: LoadedTeacher, layout: Layout) -> None:
        self.teacher, self.layout = teacher, layout
        self._specs = {name: c for name, c in layout.data_columns().items() if name not in TEXT}
        self._decoder: tuple[Tensor, Tensor] | None = None
        self._logits: Tensor | None = None
        on_gpu = teacher.device.type == "cuda"
        self._copying = torch.cuda.Stream(teacher.device) if on_gpu else None
        self._lower = GraphedLower(teacher.lower) if on_gpu else teacher.lower
        self._step = STEP if on_gpu else 1

    def batch(
        self, input_ids: np.ndarray, token_count: np.ndarray, masked_positions: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Runs ``columns`` on one batch and waits for the result. Shapes: input_ids [B, L], token_count [B],
        masked_positions [B, M] with -1 in unused slots."""
        text = {"input_ids": input_ids, "token_count": token_count}
        if masked_positions is not None:
            text["masked_positions"] = masked_positions
        return self.columns(text, len(token_count)).wait()

    @torch.inference_mode()
    def columns(self, text: Mapping[str, np.ndarray], batch_size: int) -> Pending:
        """Computes the teacher's columns of a shard from its ``TEXT`` columns. Unused slots are 0.

        A batch has sequences of similar lengths. The same samples always give the same batches.
        """
        count = text["token_count"].astype(np.int64)
        shard = _ShardColumns.zeros(self._specs, len(count), self.teacher.device)
        longest_first = np.argsort(-count, kind="stable")
        for start in range(0, len(count), batch_size):
            self._add_batch(shard, text, count, longest_first[start : start + batch_size])
        return self._start_copy(shard)

    def _add_batch(
        self, shard: _ShardColumns, text: Mapping[str, np.ndarray], count: np.ndarray, rows: np.ndarray
    ) -> None:
        """Computes one batch, the samples ``rows`` of the shard (longest first), and fills their columns."""
        # The longest row's length, rounded up to a multiple of _step so that there are few shapes.
        length = min(-(-int(count[rows[0]]) // self._step) * self._step, self.layout.length)
        ids = self._to_device(text["input_ids"][rows, :length].astype(np.int64))
        counts = self._to_device(count[rows])
        padded = None if count[rows[-1]] == length else counts
        states = self._lower(ids, padded)  # [B, length, D]
        if self.layout.positions == "pooled":
            assert self.teacher.pooling is not None
            embeddings = shard.to_float16(pool(states, counts, self.teacher.pooling))
            shard.tensors["embedding"].index_copy_(0, self._to_device(rows), embeddings)
            return
        in_batch, in_shard = self._recorded_positions(text, count, rows, length)
        every = len(in_batch) == len(rows) * length and self.layout.positions == "all"
        source = None if every else self._to_device(in_batch)
        target = self._to_device(in_shard)
        if self.layout.hidden_states != "none":
            shard.put(self._hidden_columns(shard, _select(states, source)), target)
        if self.layout.top_k:
            assert self.teacher.top is not None
            last_hidden = self.teacher.top.last_hidden(states, padded)
            shard.put(self._top_k_columns(_select(last_hidden, source)), target)

    def _recorded_positions(
        self, text: Mapping[str, np.ndarray], count: np.ndarray, rows: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns flat indices, int64 [N], of the recorded positions: in the batch [B, length] and in the
        shard [n, P]."""
        if self.layout.positions == "masked":
            masked = text["masked_positions"][rows]
            row, slot = np.nonzero(masked >= 0)
            return row * length + masked[row, slot], rows[row] * self.layout.recorded + slot
        row, position = np.nonzero(np.arange(length) < count[rows][:, None])
        return row * length + position, rows[row] * self.layout.recorded + position

    def _hidden_columns(self, shard: _ShardColumns, states: Tensor) -> dict[str, Tensor]:
        """Converts hidden states [N, D] to the store's number format."""
        if self.layout.hidden_states == "int8":
            steps, scale = quantise(states)
            return {"hidden_states": steps, "hidden_scale": scale}
        if self.layout.hidden_states == "bfloat16":
            return {"hidden_states": states.bfloat16().view(torch.int16)}
        return {"hidden_states": shard.to_float16(states)}

    def _top_k_columns(self, last_hidden: Tensor) -> dict[str, Tensor]:
        """Computes topk_ids [N, K], topk_logits [N, K], logsumexp [N, T] from last hidden states [N, D]."""
        top = self.teacher.top
        assert top is not None
        if self._decoder is None or self._logits is None:
            self._decoder = weight, bias = aligned_decoder(top.decoder_weight, top.decoder_bias)
            # One buffer is reused, as allocating it for every chunk would take as long as a forward pass.
            positions = matmul_positions(self.teacher.device.type, self.teacher.dtype)
            self._logits = bias.new_empty(positions, len(weight))
        weight, bias = self._decoder
        pieces = []
        for chunk in last_hidden.split(len(self._logits)):
            logits = self._logits[: len(chunk)]
            torch.addmm(bias, top.decoder_input(chunk), weight.t(), out=logits)
            unpadded = logits[:, : self.layout.vocab_size]
            pieces.append(reduce_logits(unpadded, self.layout.top_k, self.layout.temperatures))
        names = "topk_ids", "topk_logits", "logsumexp"
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*pieces, strict=True), strict=True)}

    def _to_device(self, values: np.ndarray) -> Tensor:
        """Starts a copy to the teacher's device, from pinned memory, and does not wait for its end."""
        tensor = torch.from_numpy(values)
        return (
            tensor
            if self._copying is None
            else tensor.pin_memory().to(self.teacher.device, non_blocking=True)
        )

    def _start_copy(self, shard: _ShardColumns) -> Pending:
        if self._copying is None:
            return Pending(shard.tensors, self._specs, shard.largest, None)
        self._copying.wait_stream(torch.cuda.current_stream(self.teacher.device))
        with torch.cuda.stream(self._copying):
            tensors = {name: _to_host(tensor) for name, tensor in shard.tensors.items()}
            largest, copy_done = _to_host(shard.largest), torch.cuda.Event(blocking=True)
            copy_done.record(self._copying)
        return Pending(tensors, self._specs, largest, copy_done, shard)


@dataclass
class _ShardColumns:
    """The columns of a shard on the device, which are filled batch by batch."""

    tensors: dict[str, Tensor]
    largest: Tensor
    """See ``Pending.largest``."""

    @classmethod
    def zeros(cls, specs: Mapping[str, Column], count: int, device: torch.device) -> _ShardColumns:
        tensors = {
            name: torch.zeros((count, *c.shape), dtype=DTYPES[c.dtype.str[1:]], device=device)
            for name, c in specs.items()
        }
        return cls(tensors, torch.zeros((), device=device))

    def to_float16(self, states: Tensor) -> Tensor:
        """Converts to float16 and updates ``largest``, by which ``Pending.wait`` detects an overflow."""
        if states.numel():
            self.largest = torch.maximum(self.largest, states.abs().amax().float())
        return states.to(torch.float16)

    def put(self, values: Mapping[str, Tensor], target: Tensor) -> None:
        """Writes values [N, ...] to the flat indices ``target`` [N] of the columns [n, P, ...]."""
        for name, value in values.items():
            column = self.tensors[name]
            column.flatten(0, 1).index_copy_(0, target, value.to(column.dtype))


def _select(states: Tensor, source: Tensor | None) -> Tensor:
    """Returns the vectors [N, D] of ``states`` [B, L, D] at flat indices ``source`` [N]; None for all."""
    flat = states.flatten(0, 1)
    return flat if source is None else flat[source]


def _to_host(tensor: Tensor) -> Tensor:
    """Starts a copy into pinned memory on the current stream, and returns its target."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
