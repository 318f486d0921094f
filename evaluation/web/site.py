"""Writes the browser page with exported models to a folder that any static host can serve (docs/web.md).

    index.html page.js worker.js ort.*.js offline.js style.css icon.svg runtime.wasm.gz runtime-gpu.wasm.gz
    models/<task>/<role>/model.int8.onnx tokenizer.json.gz golden.json.gz
    site.json      written last: tasks and models, with the size and SHA-256 of each large file

Models that are already in the folder are kept, unless a new one has the same task and role.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.devices.export_files import INT8, source_digest
from infra.errors import UserError
from infra.files import storage

SITE = "site.json"
RUNTIMES = {"cpu": "runtime.wasm.gz", "gpu": "runtime-gpu.wasm.gz"}
"""Processor that runs the model -> file of ONNX Runtime's WebAssembly. A visitor fetches only one of them."""
OFFLINE = "offline.js"
WINDOW = 384
"""Number of tokens per window of a model that answers questions, as in fine-tuning."""
Texts = tuple[str, ...]


@dataclass(frozen=True)
class SiteModel:
    """A fine-tuned model, or an encoder, for the page."""

    directory: str
    role: str
    """``student``, ``teacher``, or the name of one of several students."""
    task: str
    """Name of the task that the page shows."""
    length: int | None = None
    """Most tokens per row, within the model's limit; None: ``WINDOW`` for questions, otherwise 512."""
    labels: tuple[str, ...] = ()
    """Names of the classes that the page shows; empty: those in the model's configuration."""
    golden: tuple[Texts, ...] = ()
    """Texts for golden.json, in addition to those of ``golden.py``."""
    embedding_bits: int = 8
    """Bits per number of the word embeddings in the int8 file, see ``export``."""
    texts: int | None = None
    """Number of texts per row, 1 or 2. None: unknown; then the page has a second field that may be empty."""


def add_to_site(output: str, page: Path, models: Sequence[SiteModel]) -> dict[str, Any]:
    """Writes the page and the models to the folder ``output``; returns the content of site.json.

    page: directory of the built page. Raises UserError if a model cannot be exported or the page does not
    support its tokenizer.
    """
    from evaluation.candidates.models import local_directory

    tasks: list[dict[str, Any]] = storage.read_object(storage.join(output, SITE)).get("tasks") or []
    for model in models:
        task = next((task for task in tasks if task["name"] == model.task), None)
        if task is None:
            task = {"name": model.task, "models": []}
            tasks.append(task)
        others = [entry for entry in task["models"] if entry["role"] != model.role]
        with local_directory(model.directory) as directory:
            entries = [*others, _write_model(output, replace(model, directory=directory))]
        task["models"] = sorted(entries, key=lambda entry: entry["role"] == "teacher")
    runtimes = {key: _file_entry(name, (page / name).read_bytes()) for key, name in RUNTIMES.items()}
    _write_page(output, page, {"runtimes": runtimes, "tasks": tasks})
    site: dict[str, Any] = storage.read_json(storage.join(output, SITE))
    return site


def _write_page(output: str, page: Path, site: dict[str, Any]) -> None:
    """Writes site.json and the page's files; ``OFFLINE`` gets a digest and the names of the small files."""
    files = {path.name: path.read_bytes() for path in sorted(page.iterdir())}
    content = json.dumps(site, indent=1).encode()
    digest = hashlib.sha256(b"".join([*files.values(), content])).hexdigest()
    small_files = [name for name in files if name not in (*RUNTIMES.values(), OFFLINE)]
    constants = json.dumps({"version": digest[:16], "files": ["./", *small_files, SITE]})
    files[OFFLINE] = f"const SITE = {constants};\n".encode() + files[OFFLINE]
    for name, data in files.items():
        storage.publish_if_changed(storage.join(output, name), data)
    storage.publish_if_changed(storage.join(output, SITE), content)


def _write_model(output: str, model: SiteModel) -> dict[str, Any]:
    """Exports the model into the folder and returns its entry in site.json."""
    from evaluation.candidates.models import load_tokenizer, require_model
    from evaluation.devices.export import export
    from evaluation.web.golden import QUESTIONS, SENTENCES, golden

    require_model(model.directory)
    tokenizer = load_tokenizer(model.directory)
    tokenizer_json = _tokenizer_json(tokenizer, model.directory)
    with tempfile.TemporaryDirectory() as draft:
        summary = export(model.directory, draft, model.embedding_bits)
        kind, path = summary["kind"], os.path.join(draft, INT8)
        length = min(summary["max_length"], model.length or (WINDOW if kind == "spans" else 512))
        stride = min(128, length // 3)
        texts = [*(QUESTIONS if kind == "spans" else SENTENCES), *model.golden]
        expected = golden(path, kind, tokenizer, texts, length)
        files = {
            "graph": (INT8, Path(path).read_bytes()),
            "tokenizer": ("tokenizer.json.gz", _compress(tokenizer_json)),
            "golden": ("golden.json.gz", _compress(expected)),
        }
    entry: dict[str, Any] = {
        "role": model.role, "name": _shape(model.directory), "kind": kind, "inputs": summary["inputs"],
        "length": length, "texts": model.texts,
        "stride": stride, "labels": list(model.labels) or summary["labels"],
        "source": source_digest(model.directory),
    }  # fmt: skip
    for key, (name, data) in files.items():
        relative_path = f"models/{_folder(model.task)}/{model.role}/{name}"
        storage.publish_if_changed(storage.join(output, relative_path), data)
        entry[key] = _file_entry(relative_path, data)
    return entry


def _shape(directory: str) -> str:
    from evaluation.candidates.models import load_config

    config = load_config(directory)
    return f"{config.num_hidden_layers} layers of {config.hidden_size}"


def _folder(task: str) -> str:
    """Returns the task's name as a folder name: "-" replaces all characters but letters, digits, "-", "_"."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in task)


def _compress(content: Any) -> bytes:
    """Returns JSON in gzip, since not every host compresses files; equal content gives equal bytes."""
    return gzip.compress(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), mtime=0)


def _file_entry(path: str, data: bytes) -> dict[str, Any]:
    return {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _tokenizer_json(tokenizer: Any, directory: str) -> dict[str, Any]:
    """Returns the content of tokenizer.json. Raises UserError if the page does not support this tokenizer."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    types = {part: (content[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")}
    supported = {"normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer", "model": "WordPiece"}
    part = next((part for part in supported if types[part] != supported[part]), None)
    if part is not None:
        raise UserError(
            f"{directory}: the page supports only BERT's tokenizer ({supported[part]}), "
            f"but this model's {part.replace('_', '-')} is {types[part]}; export it without --web"
        )
    added = [token["content"] for token in content["added_tokens"] if not token["special"]]
    if added:
        remedy = "leave --web out"
        raise UserError(f"{directory}: has the added token {added[0]}, which the page cannot use; {remedy}")
    return content
