"""Runs an exported model with ONNX Runtime, alone or as a replacement for the torch model."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from evaluation.devices.latency import Inputs, Runner


def open_session(path: str, threads: int = 1) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU with that many threads."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # which would keep a file in the home directory
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, inputs: Inputs) -> dict[str, np.ndarray]:
    """Outputs by name; takes from the inputs what the graph needs."""
    names = [item.name for item in session.get_inputs()]
    outputs = [item.name for item in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, {name: inputs[name] for name in names}), strict=True))


def session_runner(session: Any) -> Runner:
    """For ``latency.measure``."""
    names = [item.name for item in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})


class OnnxModel(torch.nn.Module):
    """Answers like the torch model, so that ``training.predict`` and ``finetune.score`` take it.

    Every row is run alone and without its padding, as a device runs it.
    """

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.place = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # is on the CPU

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> Any:
        arrays = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids
        }  # fmt: skip
        rows = []
        for row, count in enumerate(attention_mask.sum(dim=1).tolist()):
            alone = {name: array[row : row + 1, :count].numpy() for name, array in arrays.items()}
            rows.append(run_session(self.session, alone))
        length = input_ids.shape[1]
        return SimpleNamespace(
            **{name: _batch(name, [row[name][0] for row in rows], length) for name in rows[0]}
        )


def _batch(name: str, rows: list[np.ndarray], length: int) -> torch.Tensor:
    """Outputs of rows together: logits [B, C]; others, [L, ...] a row, filled up to [B, length, ...]."""
    if name == "logits":
        return torch.from_numpy(np.stack(rows))
    batch = np.zeros((len(rows), length, *rows[0].shape[1:]), np.float32)
    for slot, row in enumerate(rows):
        batch[slot, : len(row)] = row
    return torch.from_numpy(batch)
