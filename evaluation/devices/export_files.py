"""File names of an exported model, and a check that an export is complete. Imports no torch."""

from __future__ import annotations

from typing import Any

from evaluation.candidates.models import Candidate
from infra.errors import UserError
from infra.files import storage

FLOAT32, INT8 = "model.onnx", "model.int8.onnx"
SUMMARY = "export.json"


def finished_export(directory: str, output: str, embedding_bits: int = 8) -> dict[str, Any] | None:
    """Returns the content of export.json if ``output`` is a complete export of ``directory``, else None."""
    path = storage.join(output, SUMMARY)
    if not storage.exists(path):
        return None
    try:
        summary = storage.read_json(path)
    except UserError:  # damaged: export again
        return None
    if not isinstance(summary, dict) or summary.get("source") != source_digest(directory):
        return None
    if summary.get("embedding_bits") != embedding_bits:
        return None
    sizes = summary.get("bytes", {})
    complete = all(
        storage.exists(storage.join(output, file)) and storage.size(storage.join(output, file)) == size
        for file, size in sizes.items()
    )
    return summary if complete and storage.exists(storage.join(output, "tokenizer.json")) else None


def source_digest(directory: str) -> str:
    """Returns the digest of the model directory that is exported (export.json: source)."""
    return Candidate("model", directory).digest()
