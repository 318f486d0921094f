"""A folder that any static host can serve: the browser page with exported models (see docs/web.md).

    index.html page.js worker.js ort.*.js offline.js style.css icon.svg runtime.wasm.gz runtime-gpu.wasm.gz
    models/<task>/<role>/model.int8.onnx tokenizer.json.gz golden.json.gz
    site.json      written last: tasks and models, with the size and SHA-256 of each large file

Adding a model keeps the others; one of the same task and role is replaced.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.devices.exported import INT8, source_digest
from infra.errors import UserError
from infra.files import storage

SITE = "site.json"
RUNTIMES = {"cpu": "runtime.wasm.gz", "gpu": "runtime-gpu.wasm.gz"}
"""ONNX Runtime's WebAssembly: a visitor fetches the one of the processor that computes."""
OFFLINE = "offline.js"
WINDOW = 384
"""Tokens of a window of a model that answers questions, as in fine-tuning."""
Texts = tuple[str, ...]


@dataclass(frozen=True)
class SiteModel:
    """A fine-tuned model, or an encoder, for the page."""

    directory: str
    role: str
    """student, teacher, or the name of one of several students."""
    task: str
    """Title of the page's entry."""
    length: int | None = None
    """Most tokens of a row; None: ``WINDOW`` for questions, else 512. Never more than the model can take."""
    labels: tuple[str, ...] = ()
    """Names of the classes, where the model's own are not to be shown."""
    golden: tuple[Texts, ...] = ()
    """Texts on which the page can be compared with Python, beside those of ``golden.py``."""
    embedding_bits: int = 8
    texts: int | None = None
    """How many texts a row has, 1 or 2; None: unknown, so the page has a second field that may be empty."""


def add_to_site(output: str, page: Path, models: Sequence[SiteModel]) -> dict[str, Any]:
    """Writes the page and the models into ``output``; returns the content of site.json.

    Raises UserError for a model that cannot be exported or whose tokenizer the page does not have.
    """
    tasks = _tasks(output)
    for model in models:
        task = next((task for task in tasks if task["name"] == model.task), None)
        if task is None:
            task = {"name": model.task, "models": []}
            tasks.append(task)
        others = [entry for entry in task["models"] if entry["role"] != model.role]
        task["models"] = sorted(
            [*others, _write_model(output, model)], key=lambda entry: entry["role"] == "teacher"
        )
    runtimes = {key: _described(name, (page / name).read_bytes()) for key, name in RUNTIMES.items()}
    _write_page(output, page, {"runtimes": runtimes, "tasks": tasks})
    site: dict[str, Any] = storage.read_json(storage.join(output, SITE))
    return site


def _tasks(output: str) -> list[dict[str, Any]]:
    path = storage.join(output, SITE)
    with contextlib.suppress(UserError, TypeError, KeyError):  # damaged: it is written again
        if storage.exists(path):
            return list(storage.read_json(path)["tasks"])
    return []


def _write_page(output: str, page: Path, site: dict[str, Any]) -> None:
    """Writes the page's files. The service worker gets their names, and a version that any change changes."""
    files = {path.name: path.read_bytes() for path in sorted(page.iterdir())}
    content = json.dumps(site, indent=1).encode()
    digest = hashlib.sha256(b"".join([*files.values(), content])).hexdigest()
    kept = [name for name in files if name not in (*RUNTIMES.values(), OFFLINE)]
    known = json.dumps({"version": digest[:16], "files": ["./", *kept, SITE]})
    files[OFFLINE] = f"const SITE = {known};\n".encode() + files[OFFLINE]
    for name, data in files.items():
        storage.publish_if_changed(storage.join(output, name), data)
    storage.publish_if_changed(storage.join(output, SITE), content)


def _write_model(output: str, model: SiteModel) -> dict[str, Any]:
    """Exports the model into the folder; its entry of site.json."""
    from evaluation.devices.export import export
    from evaluation.models import load_tokenizer, require_model
    from evaluation.web.golden import QUESTIONS, SENTENCES, golden

    require_model(model.directory)
    tokenizer = load_tokenizer(model.directory)
    packed = _tokenizer_of(tokenizer, model.directory)
    with tempfile.TemporaryDirectory() as draft:
        summary = export(model.directory, draft, model.embedding_bits)
        kind, path = summary["kind"], os.path.join(draft, INT8)
        length = min(summary["max_length"], model.length or (WINDOW if kind == "spans" else 512))
        stride = min(128, length // 3)
        texts = [*(QUESTIONS if kind == "spans" else SENTENCES), *model.golden]
        expected = golden(path, kind, tokenizer, texts, length)
        files = {
            "graph": (INT8, Path(path).read_bytes()),
            "tokenizer": ("tokenizer.json.gz", _packed(packed)),
            "golden": ("golden.json.gz", _packed(expected)),
        }
    entry: dict[str, Any] = {
        "role": model.role, "name": _shape(model.directory), "kind": kind, "inputs": summary["inputs"],
        "length": length, "texts": model.texts,
        "stride": stride, "labels": list(model.labels) or summary["labels"],
        "source": source_digest(model.directory),
    }  # fmt: skip
    for key, (name, data) in files.items():
        place = f"models/{_folder(model.task)}/{model.role}/{name}"
        storage.publish_if_changed(storage.join(output, place), data)
        entry[key] = _described(place, data)
    return entry


def _shape(directory: str) -> str:
    from evaluation.models import load_config

    config = load_config(directory)
    return f"{config.num_hidden_layers} layers of {config.hidden_size}"


def _folder(task: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in task)


def _packed(content: Any) -> bytes:
    """JSON in gzip, the same bytes for the same content; hosts do not compress every kind of file."""
    return gzip.compress(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), mtime=0)


def _described(path: str, data: bytes) -> dict[str, Any]:
    return {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _tokenizer_of(tokenizer: Any, directory: str) -> dict[str, Any]:
    """What the page reads of tokenizer.json. It knows the tokenizers of BERT's family."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = {part: (content[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")}
    wanted = {"normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer", "model": "WordPiece"}
    other = next((part for part in wanted if kinds[part] != wanted[part]), None)
    if other is not None:
        raise UserError(
            f"{directory}: the page can tokenize for BERT's family ({wanted[other]}), "
            f"and this model's {other.replace('_', '-')} is {kinds[other]}"
        )
    added = [token["content"] for token in content["added_tokens"] if not token["special"]]
    if added:
        raise UserError(f"{directory}: the page does not know tokens that were added, such as {added[0]}")
    return content
