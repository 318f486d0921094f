"""Checkpoints of a training run: full tensors without pickle, independent of the number of ranks.

    checkpoints/step-00000200/
      weights.safetensors    float32 master weights by parameter name
      exp_avg.safetensors    Adam's moments, float32
      exp_avg_sq.safetensors
      state.json             everything else, with its own digest and the digests of the others

A checkpoint is written into a temporary directory, synced, and renamed; ``state.json`` is written last. So a
directory with a final name was complete once. If it is invalid, it was damaged later: it is renamed, and the
checkpoint before it is used.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.errors import UserError
from infra.files import storage
from offline_teacher.store.records import decode, encode

FORMAT_VERSION = 1
STATE_NAME = "state.json"
TENSORS = ("weights", "exp_avg", "exp_avg_sq")
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run needs besides its tensors to continue as if it had never stopped."""

    step: int
    """Optimiser steps done; the next one has this number."""
    samples_seen: int
    optimizer_step: int
    """Steps that AdamW applied: fewer than ``step`` if float16 overflowed."""
    loss_scaler: dict[str, float]
    samples_digest: str
    """Chained digest of the ids of all samples consumed so far."""
    fingerprint: dict[str, Any]
    """The recipe's settings that affect the result, and the digest of the store."""
    tracking_run: str | None
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    path: str
    facts: Facts
    tensors: dict[str, dict[str, Tensor]]
    """``weights``, ``exp_avg``, ``exp_avg_sq``: float32 by parameter name."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save(directory: str, facts: Facts, tensors: Mapping[str, Mapping[str, Tensor]], keep: int) -> str:
    """Publishes the checkpoint of ``facts.step``, keeps only the newest ``keep``, and returns its path."""
    final = os.path.join(directory, checkpoint_name(facts.step))
    draft = os.path.join(directory, f"{storage.UNFINISHED}{secrets.token_hex(6)}")
    try:
        os.makedirs(draft)
        digests = {}
        for name in TENSORS:
            file = os.path.join(draft, f"{name}.safetensors")
            save_file(dict(tensors[name]), file)
            storage.sync(file)
            digests[os.path.basename(file)] = storage.digest_file(file)
        storage.publish_bytes(os.path.join(draft, STATE_NAME), encode({**asdict(facts), "files": digests}))
        storage.sync(draft)
        os.rename(draft, final)
        storage.sync(directory)
    except (OSError, SafetensorError) as problem:
        raise UserError(
            f"{final}: the checkpoint could not be written ({problem}); free space or fix access"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for _, name in _listed(directory)[keep:]:
        _discard(os.path.join(directory, name))
    return final


class Writer:
    """Writes checkpoints in a thread, one at a time, while training continues."""

    def __init__(self, directory: str, keep: int, written: Callable[[], None] = lambda: None) -> None:
        """``written`` is called in the thread after every checkpoint."""
        self._directory, self._keep, self._written = directory, keep, written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, facts: Facts, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The caller must not change ``tensors`` afterwards, and must have waited for the last checkpoint."""
        assert self._pending is None
        self._pending = self._thread.submit(self._write, facts, tensors)

    def wait(self) -> None:
        """Returns when the started checkpoint is on disk. Raises the error if writing it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, facts: Facts, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        save(self._directory, facts, tensors, self._keep)
        self._written()


def load_newest(directory: str) -> Checkpoint | None:
    """The newest valid checkpoint; None if there never was one. Renames damaged ones, with a warning.

    Raises UserError if checkpoints exist but none is valid, so that a run never silently starts over.
    """
    if not os.path.isdir(directory):
        return None
    for name in os.listdir(directory):
        if name.startswith(storage.UNFINISHED):
            shutil.rmtree(os.path.join(directory, name), ignore_errors=True)
    aside = [name for name in os.listdir(directory) if ".damaged-" in name]
    for _, name in _listed(directory):
        path = os.path.join(directory, name)
        try:
            return _read(path)
        except ValueError as problem:
            aside.append(_set_aside(path))
            print(
                f"warning: checkpoint {path} {problem}; it is kept as {aside[-1]}, the one before it is used",
                file=sys.stderr,
            )
    if aside:
        raise UserError(
            f"{directory}: no valid checkpoint is left (damaged: {', '.join(sorted(aside))}); "
            "remove the student's directory to start afresh"
        )
    return None


def newest_step(directory: str) -> int | None:
    """The step of the newest checkpoint according to its name; its content is not checked."""
    listed = _listed(directory) if os.path.isdir(directory) else []
    return listed[0][0] if listed else None


def _listed(directory: str) -> list[tuple[int, str]]:
    """(step, name), newest first."""
    matches = ((_NAME.fullmatch(name), name) for name in os.listdir(directory))
    return sorted(((int(match[1]), name) for match, name in matches if match), reverse=True)


def _read(path: str) -> Checkpoint:
    """Reads and checks a checkpoint. Raises ValueError that says what is damaged."""
    state_path = os.path.join(path, STATE_NAME)
    if not os.path.isfile(state_path):
        raise ValueError(f"has no {STATE_NAME}" if os.path.isdir(path) else "is not a directory")
    with open(state_path, "rb") as file:
        data = file.read()
    if not data:
        raise ValueError(f"has an empty {STATE_NAME}")
    try:
        content = decode(data)
    except ValueError as problem:
        raise ValueError(f"has a {STATE_NAME} that {problem}") from None
    files = content.pop("files", None)
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: is in checkpoint format {content.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}; use the version that wrote it, or remove the student's directory"
        )
    if not isinstance(files, dict) or set(content) != {field.name for field in fields(Facts)}:
        raise ValueError(f"has a {STATE_NAME} with missing or unknown fields")
    facts = Facts(**content)
    if os.path.basename(path) != checkpoint_name(facts.step):
        raise ValueError(f"holds step {facts.step}, not that of its name")
    return Checkpoint(path, facts, {name: _read_tensors(path, name, files) for name in TENSORS})


def _read_tensors(path: str, name: str, files: Mapping[str, str]) -> dict[str, Tensor]:
    file = f"{name}.safetensors"
    full = os.path.join(path, file)
    if not os.path.isfile(full):
        raise ValueError(f"has no {file}")
    if os.path.getsize(full) == 0:
        raise ValueError(f"has an empty {file}")
    if storage.digest_file(full) != files.get(file):
        raise ValueError(f"has a {file} that does not match its digest")
    try:
        tensors = load_file(full)
    except (SafetensorError, OSError) as problem:
        raise ValueError(f"has a {file} that cannot be read ({problem})") from None
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise ValueError(f"has a {file} whose tensors are not float32")
    return tensors


def _set_aside(path: str) -> str:
    """Renames a damaged checkpoint and returns the new name without its directory."""
    number = 1
    while os.path.exists(f"{path}.damaged-{number}"):
        number += 1
    try:
        os.rename(path, f"{path}.damaged-{number}")
    except OSError as problem:
        raise UserError(f"{path}: damaged, and it cannot be renamed ({problem}); fix access") from None
    return os.path.basename(f"{path}.damaged-{number}")


def _discard(path: str) -> None:
    """Removes a checkpoint. It is renamed first, so a crash leaves no partial one under its name."""
    doomed = os.path.join(os.path.dirname(path), f"{storage.UNFINISHED}{secrets.token_hex(6)}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
