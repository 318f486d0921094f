"""Publishes a trained student as a Hugging Face model directory: weights, tokenizer, model card."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from infra.files import storage
from infra.trees import difference
from offline_teacher.store.records import decode, encode

if TYPE_CHECKING:
    from torch import Tensor

    from infra.settings.recipe import StudentRun
    from offline_teacher.store.store import Store
    from student_train.student.model import StudentModel

MODEL = "model"
MODEL_RECORD = "model.json"
"""File beside the model directory, written last: fingerprint, results, digest of every model file."""


def publish_model(
    run: StudentRun,
    root: str,
    model: StudentModel,
    weights: Mapping[str, Tensor],
    stores: Sequence[Store],
    fingerprint: Mapping[str, Any],
    results: Mapping[str, Any],
) -> str:
    """Writes ``root/model``, then ``root/model.json``. Returns the path of the model directory. ``stores``:
    the recipe's, then those of ``train.phases``. ``weights``: float32. Raises UserError if a file cannot be
    written."""
    final = os.path.join(root, MODEL)
    draft = os.path.join(root, f"{storage.UNFINISHED}{secrets.token_hex(6)}")
    import torch
    from safetensors import SafetensorError

    from student_train.student.model_card import model_card
    from student_train.student.sentence_files import write_sentence_files

    for name, parameter in model.named_parameters():
        parameter.data = weights.get(name, parameter.data).to(parameter.device, torch.float32)
    try:
        os.makedirs(draft)
        model.save(draft)
        if model.pooling is not None:
            width, length = model.model.config.hidden_size, max(s.layout.length for s in stores)
            write_sentence_files(draft, model.pooling, model.projection, width, length)
        for name, data in stores[0].tokenizer_files().items():
            storage.publish_bytes(storage.join(draft, name), data)
        card = model_card(run, stores, model, results)
        storage.publish_bytes(os.path.join(draft, "README.md"), card.encode())
        files = {name: storage.digest_file(os.path.join(draft, name)) for name in _files(draft)}
        storage.remove(os.path.join(root, MODEL_RECORD))
        if os.path.exists(final):
            os.rename(final, os.path.join(root, f"{storage.UNFINISHED}{secrets.token_hex(6)}"))
        os.rename(draft, final)
    except (OSError, SafetensorError) as problem:
        remedy = "free space or fix access"
        raise UserError(f"{final}: the model could not be written ({problem}); {remedy}") from None
    finally:
        for name in os.listdir(root):
            if name.startswith(storage.UNFINISHED):
                shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    content = {"fingerprint": dict(fingerprint), "results": dict(results), "files": files}
    storage.publish_bytes(os.path.join(root, MODEL_RECORD), encode(content))
    return final


def _files(directory: str) -> list[str]:
    """Returns the paths of all files below ``directory``, relative to it, sorted."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names]
    return sorted(os.path.relpath(path, directory) for path in paths)


def finished_record(student_dir: str) -> dict[str, Any] | None:
    """Returns the content of model.json; None unless every model file has its recorded digest."""
    path = os.path.join(student_dir, MODEL_RECORD)
    if not os.path.isfile(path):
        return None
    try:
        content = decode(storage.read_bytes(path))
    except ValueError:
        return None
    for name, digest in content["files"].items():
        file = os.path.join(student_dir, MODEL, name)
        if not os.path.isfile(file) or storage.digest_file(file) != digest:
            return None
    return content


def require_same(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Raises UserError, with all differences, if two fingerprints of the student in ``where`` differ."""
    changed = difference(old, new)
    if changed:
        raise UserError(
            f"{where}: this student was started with other settings ({'; '.join(changed)}); "
            "restore them, choose another name for the student, or remove the directory to start over"
        )
