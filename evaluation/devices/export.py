"""Exports a model directory to ONNX files for devices, in float32 and in int8.

docs/web.md lists the files and the keys of export.json. A fine-tuned model's graph outputs logits, any other
model's graph the last hidden states. The exporter is torch's TorchScript one, which needs no other package
and leaves batch size and length variable (tested on BERT and DistilBERT).
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import torch

from evaluation.candidates.models import load_config, load_tokenizer, load_weights, require_model
from evaluation.devices.export_files import FLOAT32, INT8, SUMMARY, finished_export, source_digest
from evaluation.devices.latency import Inputs
from evaluation.devices.onnx_model import open_session, run_session
from evaluation.devices.quantisation import quantise, quiet
from evaluation.finetuning.model_inputs import input_names, inputs_of
from infra.errors import UserError
from infra.files import storage
from offline_teacher.families.positions import usable_length

OPSET = 17
"""Version of the ONNX operators."""
TOLERANCE = 1e-4
"""Largest allowed difference between outputs of torch and of the float32 graph."""
SHAPES = ((1, 4), (1, 17), (3, 33), (2, 64))
"""Shapes [B, L] of the inputs on which torch and ONNX are compared; L is cut to the model's positions."""


def export(directory: str, output: str, embedding_bits: int = 8) -> dict[str, Any]:
    """Writes the files of an export; returns the content of export.json.

    Writes nothing if ``output`` has a complete export of the same model. Raises UserError if ``directory`` is
    not a model directory, if the model cannot be loaded, or if the ONNX graph differs from torch.
    """
    require_model(directory)
    existing = finished_export(directory, output, embedding_bits)
    if existing is not None:
        return existing
    tokenizer = load_tokenizer(directory)
    model = load_for_export(directory)
    kind, labels = _kind_of(model), []
    if kind == "classification":
        labels = [str(model.config.id2label[label]) for label in range(model.config.num_labels)]
    limits = {"max_length": usable_length(model.config), "source": source_digest(directory)}
    tokenizer_json = tokenizer.backend_tokenizer.to_str().encode()
    storage.publish_bytes(storage.join(output, "tokenizer.json"), tokenizer_json)
    files = export_model(model, output, directory, embedding_bits)
    summary = {"kind": kind, "labels": labels, **limits, **files}
    storage.publish_json(storage.join(output, SUMMARY), summary)
    return summary


def export_model(model: Any, output: str, name: str, embedding_bits: int = 8) -> dict[str, Any]:
    """Writes both model files into ``output``; returns their entries for export.json.

    Raises UserError, which starts with ``name``, if the float32 graph differs from torch.
    """
    from importlib.metadata import version

    inputs, outputs = input_names(model), output_names(_kind_of(model))
    with tempfile.TemporaryDirectory() as draft:
        paths = {file: os.path.join(draft, file) for file in (FLOAT32, INT8)}
        to_onnx(model, inputs, outputs, paths[FLOAT32])
        quantise(paths[FLOAT32], paths[INT8], embedding_bits)
        named = {"float32": paths[FLOAT32], "int8": paths[INT8]}
        difference = {name: largest_difference(model, path, outputs) for name, path in named.items()}
        if not difference["float32"] <= TOLERANCE:
            raise UserError(
                f"{name}: the ONNX graph differs from torch by {difference['float32']:.2g}, more than "
                f"{TOLERANCE:g}; this architecture cannot be exported"
            )
        sizes = {file: os.path.getsize(path) for file, path in paths.items()}
        for file, path in paths.items():
            with open(path, "rb") as content:
                storage.publish_bytes(storage.join(output, file), content.read())
    return {
        "inputs": inputs,
        "outputs": outputs,
        "embedding_bits": embedding_bits,
        "opset": OPSET,
        "versions": {package: version(package) for package in ("torch", "onnxruntime")},
        "bytes": sizes,
        "int8_size_ratio": size_ratio(sizes),
        "difference": difference,
    }


def size_ratio(sizes: dict[str, int]) -> float:
    """Returns the bytes of the int8 file over the bytes of the float32 file."""
    return round(sizes[INT8] / sizes[FLOAT32], 4)


def model_kind(architecture: str, config: Any) -> str:
    """Returns the kind for export.json. ``architecture``: name of the model's class."""
    if architecture.endswith("ForQuestionAnswering"):
        return "spans"
    if architecture.endswith("ForSequenceClassification"):
        return "regression" if config.num_labels == 1 else "classification"
    return "encoder"


def _kind_of(model: Any) -> str:
    return model_kind(type(model).__name__, model.config)


def output_names(kind: str) -> list[str]:
    return {"spans": ["start_logits", "end_logits"], "encoder": ["last_hidden_state"]}.get(kind, ["logits"])


def load_for_export(directory: str) -> Any:
    """Loads the model of a directory in float32, with the attention implementation that the exporter needs.

    Raises UserError if the model cannot be loaded.
    """
    config = load_config(directory)
    kind = model_kind((config.architectures or [""])[0], config)
    names = {"spans": "AutoModelForQuestionAnswering", "encoder": "AutoModel"}
    auto_class = names.get(kind, "AutoModelForSequenceClassification")
    model, _ = load_weights(auto_class, directory, config)
    model.set_attn_implementation("eager")
    return model.eval()


class _Positional(torch.nn.Module):
    """Wraps a model so that inputs and outputs are tensors in a fixed order, as the exporter needs them."""

    def __init__(self, model: torch.nn.Module, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs
        self.select_inputs = inputs_of(model)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(**self.select_inputs(dict(zip(self.inputs, tensors, strict=True))))
        return tuple(getattr(output, name) for name in self.outputs)


def to_onnx(model: Any, inputs: list[str], outputs: list[str], path: str) -> None:
    """Writes the model's float32 graph to ``path``, traced on a padded batch so that it keeps the mask."""
    example = sample_inputs(model.config, (2, 9))
    axes = {name: {0: "batch", 1: "length"} for name in inputs}
    axes |= {name: {0: "batch"} if name == "logits" else {0: "batch", 1: "length"} for name in outputs}
    with quiet():
        torch.onnx.export(
            _Positional(model, inputs, outputs).eval(),
            tuple(torch.from_numpy(example[name]) for name in inputs),
            path, input_names=inputs, output_names=outputs, dynamic_axes=axes, opset_version=OPSET,
            dynamo=False,
        )  # fmt: skip


def sample_inputs(config: Any, shape: tuple[int, int]) -> Inputs:
    """Returns random inputs int64 [B, L], with L cut to the model's positions.

    If B > 1, the second half of the last row is padding.
    """
    shape = (shape[0], min(shape[1], usable_length(config)))
    generator = np.random.default_rng(shape[0] * 1000 + shape[1])
    ids = generator.integers(0, config.vocab_size, shape)
    mask, types = np.ones(shape, np.int64), np.zeros(shape, np.int64)
    if shape[0] > 1:
        mask[-1, shape[1] // 2 :] = 0
    types[:, shape[1] // 2 :] = 1  # for every model: inputs_of replaces it by 0 if there is only one type
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@torch.inference_mode()
def largest_difference(model: Any, path: str, outputs: list[str]) -> float:
    """Returns the largest absolute difference between outputs of torch and of the ONNX file ``path``.

    The inputs have the ``SHAPES``; padding is not compared.
    """
    session, largest = open_session(path), 0.0
    reference = _Positional(model, input_names(model), outputs)
    for shape in SHAPES:
        inputs = sample_inputs(model.config, shape)
        expected = reference(*(torch.from_numpy(inputs[name]) for name in reference.inputs))
        for onnx_output, torch_output in zip(run_session(session, inputs).values(), expected, strict=True):
            difference = np.abs(onnx_output - torch_output.numpy())
            if difference.ndim >= 2 and difference.shape[:2] == inputs["input_ids"].shape:
                difference = difference[inputs["attention_mask"] == 1]
            largest = max(largest, float(difference.max()))
    return largest
