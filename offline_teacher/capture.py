"""What a teacher pass keeps of a batch: the encoder's output, and the head's reduced to top-k and logsumexp.

Axes: B batch, L length, M masked positions a sequence, P recorded positions a sequence (L or M),
N recorded positions of a batch (padding left out), K top-k, T temperatures, V vocabulary, D hidden.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from offline_teacher.reduction import reduce_logits
from offline_teacher.store.quantise import quantise
from offline_teacher.store.schema import Layout
from offline_teacher.teacher import LoadedTeacher


def matmul_positions(device_type: str, dtype: torch.dtype) -> int:
    """Positions whose logits exist at once: enough for the matrix product to be efficient."""
    if device_type == "cuda":
        return 8192
    return 512 if dtype == torch.float32 else 256  # a float32 product first arranges the weights, every time


class _Head:
    """The masked-LM head on the teacher's device, and the reduction of its logits."""

    def __init__(self, loaded: LoadedTeacher, layout: Layout) -> None:
        from transformers.activations import ACT2FN

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(loaded.device, loaded.dtype)

        head = loaded.head
        self.layout, self.eps, self.act = layout, head.layer_norm_eps, ACT2FN[head.hidden_act]
        self.dense = tensor(head.dense_weight), tensor(head.dense_bias)
        self.norm = tensor(head.layer_norm_weight), tensor(head.layer_norm_bias)
        self.decoder_weight, self.decoder_bias = tensor(head.decoder_weight), tensor(head.decoder_bias)
        positions = matmul_positions(loaded.device.type, loaded.dtype)
        self.logits = self.decoder_bias.new_empty(positions, layout.vocab_size)

    def reduce(self, hidden: Tensor) -> dict[str, Tensor]:
        """hidden [N, D] -> topk_ids [N, K], topk_logits [N, K], logsumexp [N, T]; chunk by chunk."""
        pieces = []
        for chunk in hidden.split(len(self.logits)):
            z = F.layer_norm(self.act(F.linear(chunk, *self.dense)), chunk.shape[-1:], *self.norm, self.eps)
            logits = self.logits[: len(z)]  # written again and again: new memory costs as much as a forward
            torch.addmm(self.decoder_bias, z, self.decoder_weight.t(), out=logits)
            pieces.append(reduce_logits(logits, self.layout.top_k, self.layout.temperatures))
        ids, values, logsumexp = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return {"topk_ids": ids, "topk_logits": values, "logsumexp": logsumexp}


class Capture:
    """Runs batches through the teacher and keeps what ``layout`` holds of them, nothing else.

    Logits are what the head gives in the teacher's dtype (float32 accumulation inside the matrix
    product); logsumexp is accumulated in float32 from them. Without top-k the head never runs.
    """

    def __init__(self, loaded: LoadedTeacher, layout: Layout) -> None:
        assert layout.vocab_size == loaded.head.decoder_weight.shape[0]
        self.loaded, self.layout = loaded, layout
        self.head = _Head(loaded, layout) if layout.top_k > 0 else None

    @torch.inference_mode()
    def batch(
        self, input_ids: np.ndarray, token_count: np.ndarray, masked_positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        """input_ids [B, L], token_count [B], masked_positions [B, M] (-1: unused) -> columns [B, P, ...].

        Dtypes are the store's; positions that are not recorded are zero.
        """
        longest = int(token_count.max())  # padding after the longest row is not computed
        hidden = self.encode(input_ids[:, :longest], token_count)  # [B, longest, D]
        rows, slots, positions = self._recorded(token_count, masked_positions)
        whole = self.layout.positions == "all" and len(rows) == hidden.shape[0] * hidden.shape[1]
        kept = (
            hidden.flatten(0, 1) if whole else hidden[torch.from_numpy(rows), torch.from_numpy(positions)]
        )  # [N, D]
        values: dict[str, np.ndarray] = {}
        if self.head is not None:
            values |= {name: tensor.cpu().numpy() for name, tensor in self.head.reduce(kept).items()}
        if self.layout.hidden_states == "float16":
            values["hidden_states"] = kept.to(torch.float16).cpu().numpy()
        elif self.layout.hidden_states == "int8":
            values["hidden_states"], values["hidden_scale"] = quantise(kept.float().cpu().numpy())
        columns = self.layout.columns()
        if whole and longest == self.layout.length:  # nothing to leave out: no copy
            return {
                name: value.reshape(len(input_ids), *columns[name].shape).astype(
                    columns[name].dtype, copy=False
                )
                for name, value in values.items()
            }
        out = {name: np.zeros((len(input_ids), *columns[name].shape), columns[name].dtype) for name in values}
        for name, value in values.items():
            out[name][rows, slots] = value
        return out

    def encode(self, input_ids: np.ndarray, token_count: np.ndarray) -> Tensor:
        """Hidden states [B, L, D] of the last layer, in the teacher's dtype; no [tokens, V] anything."""
        device = self.loaded.device
        ids = torch.from_numpy(input_ids.astype(np.int64)).to(device)
        mask = None
        if token_count.min() < input_ids.shape[1]:
            real = np.arange(input_ids.shape[1]) < token_count[:, None]
            mask = torch.from_numpy(real.astype(np.int64)).to(device)
        return self.loaded.model(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state

    def _recorded(
        self, token_count: np.ndarray, masked_positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, slot and position of every recorded position of a batch, each [N]."""
        if self.layout.positions == "masked":
            rows, slots = np.nonzero(masked_positions >= 0)
            return rows, slots, masked_positions[rows, slots].astype(np.int64)
        rows, positions = np.nonzero(np.arange(self.layout.length) < token_count[:, None])
        return rows, positions, positions
