"""File names of an exported model, and a check that an export is complete. Imports no torch."""

from __future__ import annotations

from typing import Any

from evaluation.candidates.models import Candidate
from infra.files import storage

FLOAT32, INT8 = "model.onnx", "model.int8.onnx"
SUMMARY = "export.json"


def finished_export(directory: str, output: str, embedding_bits: int = 8) -> dict[str, Any] | None:
    """Returns the content of export.json if ``output`` is a complete export of ``directory``, else None."""
    summary = storage.read_object(storage.join(output, SUMMARY))
    if summary.get("source") != source_digest(directory) or summary.get("embedding_bits") != embedding_bits:
        return None
    sizes = storage.list_sizes(output)
    complete = summary.get("bytes", {}).items() <= sizes.items() and "tokenizer.json" in sizes
    return summary if complete else None


def source_digest(directory: str) -> str:
    """Returns the digest of the model directory that is exported (export.json: source)."""
    return Candidate("model", directory).digest()
