"""Runs an exported model with ONNX Runtime, directly or through the interface of the torch model."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from evaluation.devices.latency import Inputs, Runner
from evaluation.finetuning.model_inputs import NAMES


def open_session(path: str, threads: int = 1) -> Any:
    """Returns an ``onnxruntime.InferenceSession`` on the CPU with this number of threads."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # telemetry would keep a file in the home directory
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, inputs: Inputs) -> dict[str, np.ndarray]:
    """Returns output name -> array. Inputs that the graph does not have are ignored."""
    names = [item.name for item in session.get_inputs()]
    outputs = [item.name for item in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, {name: inputs[name] for name in names}), strict=True))


def session_runner(session: Any) -> Runner:
    """Returns a function that runs the session once, for ``latency.measure``."""
    names = [item.name for item in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})


class OnnxModel(torch.nn.Module):
    """A session with the interface of the torch model, for ``training.predict``.

    Every row is run as a batch of its own, without padding, as on a device.
    """

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        # ``predict`` takes the device of the first parameter: the CPU
        self.device_marker = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> Any:
        arrays = dict(zip(NAMES, (input_ids, attention_mask, token_type_ids), strict=True))
        rows = []
        for row, count in enumerate(attention_mask.sum(dim=1).tolist()):
            inputs = {name: array[row : row + 1, :count].numpy() for name, array in arrays.items()}
            rows.append(run_session(self.session, inputs))
        length = input_ids.shape[1]
        outputs = {name: _batch(name, [row[name][0] for row in rows], length) for name in rows[0]}
        return SimpleNamespace(**outputs)


def _batch(name: str, rows: list[np.ndarray], length: int) -> torch.Tensor:
    """Stacks one output of all rows to [B, C] (logits) or, with padding, [B, length, ...] (per token)."""
    if name == "logits":
        return torch.from_numpy(np.stack(rows))
    batch = np.zeros((len(rows), length, *rows[0].shape[1:]), np.float32)
    for slot, row in enumerate(rows):
        batch[slot, : len(row)] = row
    return torch.from_numpy(batch)
