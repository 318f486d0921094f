"""What a store keeps of a batch: hidden states where the teacher is cut, pooled vectors, top-k and logsumexp.

Axes: B batch, L length, M masked positions a sequence, P recorded positions a sequence (L or M),
N recorded positions of a batch (padding left out), K top-k, T temperatures, V vocabulary, D hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from infra.errors import UserError
from offline_teacher.families.pooling import pool
from offline_teacher.inference.quantise import quantise
from offline_teacher.inference.reduction import reduce_logits
from offline_teacher.inference.teacher import LoadedTeacher
from offline_teacher.store.schema import Layout

LARGEST_FLOAT16 = 65504.0


def matmul_positions(device_type: str, dtype: torch.dtype) -> int:
    """Positions whose logits exist at once: enough for the matrix product to be efficient."""
    if device_type == "cuda":
        return 8192
    return 512 if dtype == torch.float32 else 256  # a float32 product first arranges the weights, every time


class Inference:
    """Runs batches through the teacher and keeps what ``layout`` holds of them, nothing else.

    Without top-k neither the top layers nor the head run. Logits are what the head gives in the teacher's
    dtype; logsumexp is accumulated in float32 from them.
    """

    def __init__(self, teacher: LoadedTeacher, layout: Layout) -> None:
        self.teacher, self.layout = teacher, layout
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def batch(
        self, input_ids: np.ndarray, token_count: np.ndarray, masked_positions: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """input_ids [B, L], token_count [B], masked_positions [B, M] (-1: unused) -> the teacher's columns.

        Arrays [B, ...] in the store's dtypes; positions that are not recorded are zero. UserError where
        float16 cannot hold a hidden state.
        """
        length = int(token_count.max())  # padding after the longest row is not computed
        ids = torch.from_numpy(input_ids[:, :length].astype(np.int64)).to(self.teacher.device)
        count = None
        if token_count.min() < length:
            count = torch.from_numpy(token_count.astype(np.int64)).to(self.teacher.device)
        states = self.teacher.lower(ids, count)  # [B, length, D]
        if self.layout.positions == "pooled":
            return {"embedding": self._pooled(states, token_count)}
        rows, slots, positions = self._recorded(token_count, masked_positions)
        whole = self.layout.positions == "all" and len(rows) == states.shape[0] * length
        values: dict[str, np.ndarray] = {}
        if self.layout.hidden_states != "none":
            values |= self._stored(_picked(states, rows, positions, whole))
        if self.layout.top_k:
            assert self.teacher.top is not None
            last = self.teacher.top.last_hidden(states, count)
            values |= self._reduced(_picked(last, rows, positions, whole))
        return self._placed(values, len(input_ids), rows, slots, whole and length == self.layout.length)

    def _pooled(self, states: Tensor, token_count: np.ndarray) -> np.ndarray:
        """float16 [B, D]"""
        assert self.teacher.pooling is not None
        count = torch.from_numpy(token_count.astype(np.int64)).to(states.device)
        return _float16(pool(states, count, self.teacher.pooling)).cpu().numpy()

    def _stored(self, states: Tensor) -> dict[str, np.ndarray]:
        """Hidden states [N, D] as the store keeps them."""
        if self.layout.hidden_states == "int8":
            steps, scale = quantise(states)
            return {"hidden_states": steps.cpu().numpy(), "hidden_scale": scale.cpu().numpy()}
        if self.layout.hidden_states == "bfloat16":
            return {"hidden_states": states.bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)}
        return {"hidden_states": _float16(states).cpu().numpy()}

    def _reduced(self, last_hidden: Tensor) -> dict[str, np.ndarray]:
        """Last hidden states [N, D] -> topk_ids [N, K], topk_logits [N, K], logsumexp [N, T]."""
        top = self.teacher.top
        assert top is not None
        weight, bias = top.decoder_weight, top.decoder_bias
        if self._logits is None:  # written again and again: new memory costs as much as a forward
            positions = matmul_positions(self.teacher.device.type, self.teacher.dtype)
            self._logits = bias.new_empty(positions, len(weight))
        pieces = []
        for chunk in last_hidden.split(len(self._logits)):
            logits = self._logits[: len(chunk)]
            torch.addmm(bias, top.decoder_input(chunk), weight.t(), out=logits)
            pieces.append(reduce_logits(logits, self.layout.top_k, self.layout.temperatures))
        names = "topk_ids", "topk_logits", "logsumexp"
        joined = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return {name: tensor.cpu().numpy() for name, tensor in zip(names, joined, strict=True)}

    def _recorded(
        self, token_count: np.ndarray, masked_positions: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, slot and position of every recorded position of a batch, each [N]."""
        if self.layout.positions == "masked":
            assert masked_positions is not None
            rows, slots = np.nonzero(masked_positions >= 0)
            return rows, slots, masked_positions[rows, slots].astype(np.int64)
        rows, positions = np.nonzero(np.arange(self.layout.length) < token_count[:, None])
        return rows, positions, positions

    def _placed(
        self, values: dict[str, np.ndarray], count: int, rows: np.ndarray, slots: np.ndarray, whole: bool
    ) -> dict[str, np.ndarray]:
        """Values [N, ...] as columns [B, P, ...] of the store's dtypes."""
        columns = self.layout.columns()
        placed = {}
        for name, value in values.items():
            column = columns[name]
            if whole:  # nothing to leave out: no copy
                placed[name] = value.reshape(count, *column.shape).astype(column.dtype, copy=False)
                continue
            placed[name] = np.zeros((count, *column.shape), column.dtype)
            placed[name][rows, slots] = value
        return placed


def _picked(states: Tensor, rows: np.ndarray, positions: np.ndarray, whole: bool) -> Tensor:
    """[B, L, D] -> [N, D]."""
    if whole:
        return states.flatten(0, 1)
    return states[torch.from_numpy(rows), torch.from_numpy(positions)]


def _float16(states: Tensor) -> Tensor:
    if states.numel() and float(states.abs().max()) > LARGEST_FLOAT16:  # NaN passes: its own check names it
        raise UserError(
            "store.hidden_states: float16 cannot hold this teacher's hidden states, the largest of which is"
            f" {float(states.abs().max()):.3g}; set store.hidden_states: bfloat16, or int8"
        )
    return states.to(torch.float16)
