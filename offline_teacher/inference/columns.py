"""Computes a store's columns: hidden states at the cut, pooled vectors, top-k logits and logsumexp.

The host waits for the device only in ``Pending.wait``. A shard's columns are filled on the device in the
store's dtypes, then copied to the host together, on a CUDA stream of their own, while the next is computed.

Axes: n samples of a shard, B batch, L length, M masked positions a sequence, P positions kept of a sequence
(L: all, or M: the masked ones), N of these that are filled in a batch, K top-k, T temperatures,
V vocabulary, D hidden.
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
HELD = {"u2": torch.int16, "u4": torch.int32, "f2": torch.float16, "f4": torch.float32, "i1": torch.int8}
"""Column dtype -> dtype on the device: for unsigned integers, signed ones of the same size."""


def matmul_positions(device_type: str, dtype: torch.dtype) -> int:
    """How many positions go through the output layer at a time: enough for an efficient product."""
    if device_type == "cuda":
        return 8192
    return 512 if dtype == torch.float32 else 256  # every float32 product repacks the weights


@dataclass(frozen=True)
class Pending:
    """Columns on their way to the host."""

    tensors: Mapping[str, Tensor]
    described: Mapping[str, Column]
    largest: Tensor
    """Largest magnitude among the values that were converted to float16."""
    copy_done: torch.cuda.Event | None
    """Event that ends the copy; None if there is nothing to wait for."""
    kept: object = None
    """Keeps the source of the copy alive."""

    def wait(self) -> dict[str, np.ndarray]:
        """Arrays [n, ...] in the store's dtypes. Raises UserError if a hidden state exceeds float16."""
        if self.copy_done is not None:
            self.copy_done.synchronize()
        if float(self.largest) > LARGEST_FLOAT16:  # NaN passes; the store's checks find it
            raise UserError(
                "store.hidden_states: float16 cannot hold this teacher's hidden states, the largest of which"
                f" is {float(self.largest):.3g}; set store.hidden_states: bfloat16, or int8"
            )
        return {
            name: tensor.numpy().view(self.described[name].dtype) for name, tensor in self.tensors.items()
        }


class Inference:
    """Runs text through the teacher and keeps only the columns of ``layout``.

    Without top-k, neither the top layers nor the head run. Logits have the teacher's dtype; logsumexp is
    accumulated from them in float32. Only one thread may use an instance at a time.
    """

    def __init__(self, teacher: LoadedTeacher, layout: Layout) -> None:
        self.teacher, self.layout = teacher, layout
        self._described = {name: c for name, c in layout.data_columns().items() if name not in TEXT}
        self._decoder: tuple[Tensor, Tensor] | None = None
        self._logits: Tensor | None = None
        on_gpu = teacher.device.type == "cuda"
        self._copying = torch.cuda.Stream(teacher.device) if on_gpu else None
        self._lower = GraphedLower(teacher.lower) if on_gpu else teacher.lower
        self._step = STEP if on_gpu else 1

    def batch(
        self, input_ids: np.ndarray, token_count: np.ndarray, masked_positions: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """``columns`` of one batch, on the host; input_ids [B, L], token_count [B], masked_positions [B, M]
        with -1 in unused slots."""
        text = {"input_ids": input_ids, "token_count": token_count}
        if masked_positions is not None:
            text["masked_positions"] = masked_positions
        return self.columns(text, len(token_count)).wait()

    @torch.inference_mode()
    def columns(self, text: Mapping[str, np.ndarray], batch_size: int) -> Pending:
        """The teacher's columns of a shard from its ``TEXT`` columns. Slots that are not filled stay 0.

        A batch has sequences of similar lengths. The same samples always give the same batches.
        """
        count = text["token_count"].astype(np.int64)
        filled = _Filled.of(self._described, len(count), self.teacher.device)
        longest_first = np.argsort(-count, kind="stable")
        for start in range(0, len(count), batch_size):
            self._add(filled, text, count, longest_first[start : start + batch_size])
        return self._sent_back(filled)

    def _add(
        self, filled: _Filled, text: Mapping[str, np.ndarray], count: np.ndarray, rows: np.ndarray
    ) -> None:
        """Computes one batch: the shard's ``rows``, longest first."""
        # The longest row's length, rounded up to a multiple of _step so that there are few shapes.
        length = min(-(-int(count[rows[0]]) // self._step) * self._step, self.layout.length)
        ids = self._sent(text["input_ids"][rows, :length].astype(np.int64))
        counts = self._sent(count[rows])
        padded = None if count[rows[-1]] == length else counts
        states = self._lower(ids, padded)  # [B, length, D]
        if self.layout.positions == "pooled":
            assert self.teacher.pooling is not None
            vectors = filled.float16(pool(states, counts, self.teacher.pooling))
            filled.tensors["embedding"].index_copy_(0, self._sent(rows), vectors)
            return
        source, target = self._recorded(text, count, rows, length)
        every = len(source) == len(rows) * length and self.layout.positions == "all"
        at = None if every else self._sent(source)
        target_at = self._sent(target)
        if self.layout.hidden_states != "none":
            filled.put(self._stored(filled, _picked(states, at)), target_at)
        if self.layout.top_k:
            assert self.teacher.top is not None
            filled.put(self._reduced(_picked(self.teacher.top.last_hidden(states, padded), at)), target_at)

    def _recorded(
        self, text: Mapping[str, np.ndarray], count: np.ndarray, rows: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Flat indices, int64 [N], of recorded positions: in the batch [B, length], in the shard [n, P]."""
        if self.layout.positions == "masked":
            masked = text["masked_positions"][rows]
            row, slot = np.nonzero(masked >= 0)
            return row * length + masked[row, slot], rows[row] * self.layout.recorded + slot
        row, position = np.nonzero(np.arange(length) < count[rows][:, None])
        return row * length + position, rows[row] * self.layout.recorded + position

    def _stored(self, filled: _Filled, states: Tensor) -> dict[str, Tensor]:
        """Hidden states [N, D] converted to the store's columns."""
        if self.layout.hidden_states == "int8":
            steps, scale = quantise(states)
            return {"hidden_states": steps, "hidden_scale": scale}
        if self.layout.hidden_states == "bfloat16":
            return {"hidden_states": states.bfloat16().view(torch.int16)}
        return {"hidden_states": filled.float16(states)}

    def _reduced(self, last_hidden: Tensor) -> dict[str, Tensor]:
        """Last hidden states [N, D] -> topk_ids [N, K], topk_logits [N, K], logsumexp [N, T]."""
        top = self.teacher.top
        assert top is not None
        if self._decoder is None or self._logits is None:
            self._decoder = weight, bias = aligned_decoder(top.decoder_weight, top.decoder_bias)
            # One buffer is reused: allocating it for every chunk would take as long as a forward of the
            # teacher.
            positions = matmul_positions(self.teacher.device.type, self.teacher.dtype)
            self._logits = bias.new_empty(positions, len(weight))
        weight, bias = self._decoder
        pieces = []
        for chunk in last_hidden.split(len(self._logits)):
            logits = self._logits[: len(chunk)]
            torch.addmm(bias, top.decoder_input(chunk), weight.t(), out=logits)
            known = logits[:, : self.layout.vocab_size]
            pieces.append(reduce_logits(known, self.layout.top_k, self.layout.temperatures))
        names = "topk_ids", "topk_logits", "logsumexp"
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*pieces, strict=True), strict=True)}

    def _sent(self, values: np.ndarray) -> Tensor:
        """Copies to the teacher's device, from pinned memory, without waiting."""
        tensor = torch.from_numpy(values)
        return (
            tensor
            if self._copying is None
            else tensor.pin_memory().to(self.teacher.device, non_blocking=True)
        )

    def _sent_back(self, filled: _Filled) -> Pending:
        if self._copying is None:
            return Pending(filled.tensors, self._described, filled.largest, None)
        self._copying.wait_stream(torch.cuda.current_stream(self.teacher.device))
        with torch.cuda.stream(self._copying):
            tensors = {name: _to_host(tensor) for name, tensor in filled.tensors.items()}
            largest, copied = _to_host(filled.largest), torch.cuda.Event(blocking=True)
            copied.record(self._copying)
        return Pending(tensors, self._described, largest, copied, filled)


@dataclass
class _Filled:
    """The columns of a shard on the device, filled batch by batch."""

    tensors: dict[str, Tensor]
    largest: Tensor

    @classmethod
    def of(cls, described: Mapping[str, Column], count: int, device: torch.device) -> _Filled:
        """Allocates the columns, all zero."""
        tensors = {
            name: torch.zeros((count, *c.shape), dtype=HELD[c.dtype.str[1:]], device=device)
            for name, c in described.items()
        }
        return cls(tensors, torch.zeros((), device=device))

    def float16(self, states: Tensor) -> Tensor:
        """Converts to float16 and updates ``largest``, from which overflow is detected later."""
        if states.numel():
            self.largest = torch.maximum(self.largest, states.abs().amax().float())
        return states.to(torch.float16)

    def put(self, values: Mapping[str, Tensor], target: Tensor) -> None:
        """Writes values [N, ...] to the flat positions ``target`` [N] of the columns [n, P, ...]."""
        for name, value in values.items():
            column = self.tensors[name]
            column.flatten(0, 1).index_copy_(0, target, value.to(column.dtype))


def _picked(states: Tensor, at: Tensor | None) -> Tensor:
    """[B, L, D] -> [N, D] at the flat positions ``at``; None: all positions."""
    flat = states.flatten(0, 1)
    return flat if at is None else flat[at]


def _to_host(tensor: Tensor) -> Tensor:
    """Queues a copy into pinned memory on the current stream."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
