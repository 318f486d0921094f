"""The record of a finished pass, ``pass.json``, which tells the same command that nothing is left to do.

The record holds a digest of the inputs (settings, corpus, teacher) and the digest of the manifest. A local
file counts as unchanged if its size and change time are the same, as in make. If anything differs, the pass
runs and compares contents. This module does not import torch, Ray or MLflow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
from importlib.metadata import version
from typing import Any

from infra.errors import UserError
from infra.files import storage
from infra.settings.recipe import Recipe
from offline_teacher.corpus.partition import Part
from offline_teacher.models.loading import HUB_FILES, find_teacher
from offline_teacher.sequences.tokenizer import VOCABULARY_FILES
from offline_teacher.store.paths import MANIFEST
from offline_teacher.store.schema import FORMAT_VERSION

NAME = "pass.json"
SECTIONS = ("corpus", "sequences", "masking", "teacher", "store")


def inputs_digest(recipe: Recipe, parts: dict[str, list[Part]]) -> str:
    """Returns the digest of everything that determines a store's content; of a hub dataset only its name.
    ``parts``: the text of each split."""
    assert recipe.corpus is not None
    assert recipe.teacher is not None
    teacher = find_teacher(recipe.teacher)
    listed = {} if recipe.corpus.source == "hub" else parts
    spans = {split: [span for part in ours for span in part.spans] for split, ours in listed.items()}
    local = {s.path for ours in spans.values() for s in ours if not storage.is_remote(s.path)}
    patterns = (*HUB_FILES, *VOCABULARY_FILES)
    names = [name for name in storage.list_names(teacher) if any(fnmatch.fnmatch(name, p) for p in patterns)]
    inputs = [
        recipe.fingerprinted_settings(*SECTIONS),
        dataclasses.asdict(recipe.corpus),
        dataclasses.asdict(recipe.tracking),
        [FORMAT_VERSION, version("transformers"), version("tokenizers")],  # both libraries turn text into ids
        [[name, *_stamp(storage.join(teacher, name))] for name in names],
        {split: [dataclasses.astuple(span) for span in ours] for split, ours in spans.items()},
        [[path, *_stamp(path)] for path in sorted(local)],
    ]
    return storage.digest_bytes(json.dumps(inputs, sort_keys=True).encode())


def is_recorded(recipe: Recipe, inputs: str) -> bool:
    """Whether the last pass of this recipe had the same ``inputs``, and its manifest is unchanged."""
    path = storage.join(recipe.root, NAME)
    names = storage.list_names(recipe.root) if recipe.tracking.enabled else []
    unsent = any(fnmatch.fnmatch(name, "tracking-*.jsonl") for name in names)
    if unsent or not storage.exists(path):  # starting a run sends unsent calls to the tracking server
        return False
    with contextlib.suppress(UserError):  # a damaged record counts as missing
        record = _record(recipe, inputs)
        return record["manifest"] is not None and bool(storage.read_json(path) == record)
    return False


def remember(recipe: Recipe, inputs: str) -> None:
    """Publishes ``pass.json``; call it after the manifest is published."""
    storage.publish_json(storage.join(recipe.root, NAME), _record(recipe, inputs))


def _record(recipe: Recipe, inputs: str) -> dict[str, Any]:
    path = storage.join(recipe.store_path, MANIFEST)
    manifest = storage.digest_bytes(storage.read_bytes(path)) if storage.exists(path) else None
    return {"store": recipe.store_path, "inputs": inputs, "manifest": manifest}


def _stamp(path: str) -> list[int]:
    """Returns the size of a local file in bytes, and the time of its last change (ctime, ns)."""
    status = os.stat(path)
    return [status.st_size, status.st_ctime_ns]
