"""The finished student as a model directory: weights, tokenizer, card; published whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infra import storage
from infra.errors import UserError
from infra.recipe import StudentRun
from infra.sections import Train
from offline_teacher.store.reader import Store
from offline_teacher.store.records import decode, encode
from student_train.student.model import StudentModel, needs_head

MODEL = "model"
SEAL = "model.json"
"""Beside the model directory, written last: fingerprint, results, the digest of every file of the model."""


def publish_model(
    run: StudentRun,
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
        parameter.data = weights.get(name, parameter.data).to(parameter.device, torch.float32)
    try:
        os.makedirs(draft)
        model.save(draft)
        for name, data in store.tokenizer_files().items():
            storage.publish_bytes(storage.join(draft, name), data)
        card = model_card(run, store, model, results)
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
    storage.publish_bytes(os.path.join(root, SEAL), encode(content))
    return final


def finished(student_dir: str) -> dict[str, Any] | None:
    """Content of the seal where the model is there and every file as it was published; else None."""
    path = os.path.join(student_dir, SEAL)
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


def model_card(run: StudentRun, store: Store, model: StudentModel, results: Mapping[str, Any]) -> str:
    """README.md of the model directory."""
    train, fingerprint = run.train, store.spec.fingerprint
    task = "fill-mask" if needs_head(train) else "feature-extraction"
    front = f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- distillation\n---\n"
    split = store.splits["train"].plan
    lineage = [
        ("store", store.digest),
        ("teacher weights", fingerprint.get("teacher")),
        ("tokenizer", fingerprint.get("tokenizer")),
        ("sequences x masking epochs", f"{split.samples_per_epoch:,} x {split.masking_epochs}"),
        ("sequence length", store.layout.length),
    ]
    kind = "masked language model" if needs_head(train) else "text encoder (no masked-LM head was trained)"
    parts = [
        f"{front}\n# {run.recipe.name} / {run.name}\n",
        f"A {kind} distilled from a larger teacher, whose outputs came from a store on disk.\n",
        "```python\nfrom transformers import pipeline\n",
        f'pipeline("{task}", model="path/to/this/directory")\n```\n',
        "## Lineage\n",
        _table(("what", "value"), lineage),
        f"\n## Training\n\nLoss: {_loss(train, results)}; {results['steps']:,} steps of {train.batch_size}"
        " sequences.\n",
        _table(("at the last logged step", "value"), sorted(results["training"].items())),
        _frozen(model),
        "\n## Held-out text\n",
        _table(("measure", "value"), sorted(results["validation"].items()))
        if results["validation"]
        else "The store holds none.\n",
        "" if needs_head(train) else "Measures over the vocabulary: not trained.\n",
        "\n## Recipe\n",
        f"```json\n{json.dumps(run.fingerprinted(), indent=1, sort_keys=True)}\n```\n",
    ]
    return "\n".join(parts)


def _loss(train: Train, results: Mapping[str, Any]) -> str:
    terms = {
        f"{train.alpha_ce:g} * T^2 * KL": train.alpha_ce,
        f"{train.alpha_mlm:g} * MLM": train.alpha_mlm,
        f"{train.alpha_cos:g} * (1 - cosine)": train.alpha_cos,
        f"{train.alpha_relation:g} * relations": train.alpha_relation,
    }
    text = " + ".join(name for name, weight in terms.items() if weight)
    soft_targets = results["soft_targets"]
    return f"{text}, T = {train.temperature:g}, soft targets: {soft_targets}" if soft_targets else text


def _frozen(model: StudentModel) -> str:
    """The parameters that no term of the loss reaches."""
    names = [name.removeprefix("model.") for name, p in model.named_parameters() if not p.requires_grad]
    if not names:
        return ""
    return "\nNo term of the loss reaches these parameters, which are as they began:\n\n" + "".join(
        f"- `{name}`\n" for name in names
    )


def _table(headers: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {headers[0]} | {headers[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {_shown(value)} |" for name, value in rows)]) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
