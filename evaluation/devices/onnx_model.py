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
    """Answers like the torch model, so that ``training.predict`` and ``finetune.score`` take it."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.place = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # is on the CPU

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> Any:
        tensors = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids
        }  # fmt: skip
        outputs = run_session(self.session, {name: tensor.numpy() for name, tensor in tensors.items()})
        return SimpleNamespace(**{name: torch.from_numpy(array) for name, array in outputs.items()})
