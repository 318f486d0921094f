"""Models that the latency table of a report times beside the torch models on the CPU: ONNX files, copies on
a GPU, and a network of ELMo's size."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.candidates.models import Candidate, load_model, parameters, weight_bytes
from evaluation.devices import elmo, latency
from evaluation.devices.export import export_model
from evaluation.devices.export_files import FLOAT32, INT8
from evaluation.devices.latency import Inputs, Runner
from evaluation.devices.onnx_model import open_session, session_runner
from evaluation.sources.catalogue import find_task
from infra.settings.sections import Evaluation


@dataclass(frozen=True)
class TimedModel:
    """A model whose latency is measured, although the report has no scores of it."""

    runner: Runner
    inputs: dict[int, list[Inputs]]
    """Batch size -> batches."""
    parameters: int
    bytes: int | None
    """Size of the model's weight files; None if it has no files."""


def onnx_models(
    student: Candidate, settings: Evaluation, inputs: dict[int, list[Inputs]]
) -> dict[str, TimedModel]:
    """Returns row name -> the student in ONNX, in float32 and in int8, with an untrained STS-B head."""
    model = load_model(student, find_task("STS-B"), seed=0).eval()
    model.set_attn_implementation("eager")
    models, count = {}, parameters(model)
    with tempfile.TemporaryDirectory() as draft:
        sizes = export_model(model, draft, student.directory)["bytes"]
        for name, file in (("fp32", FLOAT32), ("int8", INT8)):
            session = open_session(os.path.join(draft, file), settings.latency_threads)
            runner = session_runner(session)
            models[f"{student.name} ONNX {name}"] = TimedModel(runner, inputs, count, sizes[file])
    return models


def gpu_model(candidate: Candidate, model: Any, inputs: dict[int, list[Inputs]]) -> dict[str, TimedModel]:
    """Returns row name -> a copy of the torch model on the GPU; {} if there is no GPU."""
    if not torch.cuda.is_available():
        return {}
    runner = latency.torch_runner(copy.deepcopy(model), "cuda")
    size = weight_bytes(candidate.directory)
    return {f"{candidate.name} GPU": TimedModel(runner, inputs, parameters(model), size)}


def elmo_model(settings: Evaluation, texts: Sequence[tuple[str, ...]]) -> TimedModel:
    """Returns a network of ELMo's size with random weights."""
    network = elmo.build()
    batches = {size: elmo.batches(texts, size, settings.max_length) for size in (1, *latency.BATCH_SIZES)}
    return TimedModel(elmo.runner(network), batches, elmo.parameters(network), None)
