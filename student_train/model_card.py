"""The finished student as a model directory: weights, tokenizer, card; published whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.errors import UserError
from infra.recipe import Recipe
from infra.trees import difference
from offline_teacher.store.reader import Store
from offline_teacher.store.sealed import seal, unseal

if TYPE_CHECKING:  # a finished student is told without torch
    from torch import Tensor

    from student_train.student import StudentModel

MODEL = "model"
SEAL = "model.json"
"""Beside the model directory, written last: fingerprint, results, the digest of every file of the model."""


def publish_model(
    recipe: Recipe,
    root: str,
    model: StudentModel,
    weights: Mapping[str, Tensor],
    store: Store,
    fingerprint: Mapping[str, Any],
    results: Mapping[str, Any],
) -> str:
    """Writes ``root/model`` with float32 ``weights`` (by parameter name) and seals it; its path."""
    final, draft = (
        os.path.join(root, MODEL),
        os.path.join(root, f"{storage.UNFINISHED}{secrets.token_hex(6)}"),
    )
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].to(parameter.device)
    try:
        os.makedirs(draft)
        model.save(draft)
        for name, data in store.tokenizer_files().items():
            storage.publish_bytes(storage.join(draft, name), data)
        card = model_card(recipe, store, results)
        storage.publish_bytes(os.path.join(draft, "README.md"), card.encode())
        files = {name: storage.digest_file(os.path.join(draft, name)) for name in sorted(os.listdir(draft))}
        storage.remove(os.path.join(root, SEAL))
        if os.path.exists(final):
            os.rename(final, os.path.join(root, f"{storage.UNFINISHED}{secrets.token_hex(6)}"))
        os.rename(draft, final)
    except OSError as problem:
        raise UserError(
            f"{final}: the model could not be written ({problem}); free space or fix access"
        ) from None
    finally:
        for name in os.listdir(root):
            if name.startswith(storage.UNFINISHED):
                shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    content = {"fingerprint": dict(fingerprint), "results": dict(results), "files": files}
    storage.publish_bytes(os.path.join(root, SEAL), seal(content))
    return final


def finished(student_dir: str) -> dict[str, Any] | None:
    """Content of the seal where the model is there and every file as it was published; else None."""
    path = os.path.join(student_dir, SEAL)
    if not os.path.isfile(path):
        return None
    try:
        content = unseal(storage.read_bytes(path))
    except ValueError:
        return None
    for name, digest in content["files"].items():
        file = os.path.join(student_dir, MODEL, name)
        if not os.path.isfile(file) or storage.digest_file(file) != digest:
            return None
    return content


def require_same(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """UserError, which lists every difference, if the two fingerprints of a student differ."""
    changed = difference(old, new)
    if changed:
        raise UserError(
            f"{where}: this student was begun with other settings ({'; '.join(changed)}); "
            "put them back, choose another name, or remove the directory to start afresh"
        )


def model_card(recipe: Recipe, store: Store, results: Mapping[str, Any]) -> str:
    """README.md of the model directory."""
    train, fingerprint = recipe.train, store.manifest.fingerprint
    front = "---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags:\n- distillation\n---\n"
    lineage = [
        ("store", store.manifest.digest),
        ("teacher weights", fingerprint.get("teacher")),
        ("tokenizer", fingerprint.get("tokenizer")),
        ("corpus", fingerprint.get("corpus")),
        ("sequences x maskings", f"{store.plan.sequences:,} x {store.plan.replicas}"),
    ]
    loss = f"{train.alpha_ce:g} * T^2 * KL + {train.alpha_mlm:g} * MLM + {train.alpha_cos:g} * (1 - cosine), "
    loss += f"T = {train.temperature:g}, soft targets: {results['soft_targets'] or 'none'}"
    parts = [
        f"{front}\n# {recipe.name}\n",
        "A masked language model distilled from a larger teacher, whose outputs came from a store on disk.\n",
        "```python\nfrom transformers import pipeline\n",
        'pipeline("fill-mask", model="path/to/this/directory")\n```\n',
        "## Lineage\n",
        _table(("what", "value"), lineage),
        f"\n## Training\n\nLoss: {loss}; {results['steps']:,} steps of {train.batch_size} sequences.\n",
        _table(("at the last logged step", "value"), sorted(results["training"].items())),
        "\n## Held-out text\n",
        _table(("measure", "value"), sorted(results["validation"].items()))
        if results["validation"]
        else "The recipe names none.\n",
        "\n## Recipe\n",
        f"```json\n{json.dumps(recipe.outcome('student', 'train'), indent=1, sort_keys=True)}\n```\n",
    ]
    return "\n".join(parts)


def _table(headers: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {headers[0]} | {headers[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {_shown(value)} |" for name, value in rows)]) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
