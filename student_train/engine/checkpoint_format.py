"""The files of a checkpoint: full tensors without pickle, independent of the number of ranks.

    checkpoints/step-00000200/
      weights.safetensors    float32 master weights by parameter name
      exp_avg.safetensors    Adam's first moments, float32
      exp_avg_sq.safetensors Adam's second moments, float32
      state.json             `RunState`, with its own digest and the digests of the other files

A checkpoint is written into a temporary directory, with ``state.json`` last, synced, and renamed. So every
directory named ``step-*`` was once complete. If one is damaged later, it is renamed, and the previous
checkpoint is used.
"""

from __future__ import annotations

import contextlib
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
class RunState:
    """What a run needs, besides tensors, to continue as if it had never stopped."""

    step: int
    """Number of optimiser steps done. Steps are numbered from 0, so the next step has this number."""
    samples_seen: int
    """Number of samples of these steps."""
    optimizer_step: int
    """Number of steps that AdamW applied: fewer than ``step`` if float16 gradients overflowed."""
    loss_scaler: dict[str, float]
    """State of DeepSpeed's loss scaler; empty unless ``train.dtype`` is float16."""
    samples_digest: str
    """Chained digest of the locations of all samples so far."""
    fingerprint: dict[str, Any]
    """The recipe's settings that affect the result, and the digests of the stores."""
    tracking_run: str | None
    """Id of the MLflow run; None without tracking."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    path: str
    run_state: RunState
    tensors: dict[str, dict[str, Tensor]]
    """``weights``, ``exp_avg``, ``exp_avg_sq``: float32 by parameter name."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save(directory: str, run_state: RunState, tensors: Mapping[str, Mapping[str, Tensor]], keep: int) -> str:
    """Writes a checkpoint, removes all but the newest ``keep``, and returns the new one's path. Raises
    UserError if a file cannot be written."""
    final = os.path.join(directory, checkpoint_name(run_state.step))
    draft = os.path.join(directory, f"{storage.UNFINISHED}{secrets.token_hex(6)}")
    try:
        os.makedirs(draft)
        digests = {}
        for name in TENSORS:
            file = os.path.join(draft, f"{name}.safetensors")
            save_file(dict(tensors[name]), file)
            storage.sync(file)
            digests[os.path.basename(file)] = storage.digest_file(file)
        state = encode({**asdict(run_state), "files": digests})
        storage.publish_bytes(os.path.join(draft, STATE_NAME), state)
        storage.sync(draft)
        os.rename(draft, final)
        storage.sync(directory)
    except (OSError, SafetensorError) as problem:
        raise UserError(
            f"{final}: the checkpoint could not be written ({problem}); free space or fix access"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for _, name in _checkpoints_in(directory)[keep:]:
        _discard(os.path.join(directory, name))
    return final


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, while training continues."""

    def __init__(self, directory: str, keep: int, after_write: Callable[[], None] = lambda: None) -> None:
        """``after_write``: called in the thread after every checkpoint."""
        self._directory, self._keep, self._after_write = directory, keep, after_write
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, run_state: RunState, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Starts to write a checkpoint. Call ``wait`` before the next ``start``. The thread reads
        ``tensors``, so the caller must not change them any more."""
        assert self._pending is None
        self._pending = self._thread.submit(self._write, run_state, tensors)

    def wait(self) -> None:
        """Returns when the started checkpoint is on disk. Raises UserError if writing failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, run_state: RunState, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        save(self._directory, run_state, tensors, self._keep)
        self._after_write()


def load_newest(directory: str) -> Checkpoint | None:
    """Returns the newest valid checkpoint; None if there never was a checkpoint. Damaged checkpoints are
    renamed, with a warning. Raises UserError if all are damaged, so that a run never silently starts over."""
    if not os.path.isdir(directory):
        return None
    for name in os.listdir(directory):
        if name.startswith(storage.UNFINISHED):
            shutil.rmtree(os.path.join(directory, name), ignore_errors=True)
    damaged = [name for name in os.listdir(directory) if ".damaged-" in name]
    for _, name in _checkpoints_in(directory):
        path = os.path.join(directory, name)
        try:
            return _read(path)
        except ValueError as problem:
            damaged.append(_rename_damaged(path))
            print(
                f"warning: checkpoint {path} {problem}; it is renamed {damaged[-1]}, and the"
                " previous checkpoint is used instead",
                file=sys.stderr,
            )
    if damaged:
        raise UserError(
            f"{directory}: no valid checkpoint is left (damaged: {', '.join(sorted(damaged))}); "
            "remove the student's directory to start over"
        )
    return None


def newest_step(directory: str) -> int | None:
    """Returns the step in the newest checkpoint's name, unchecked; None without checkpoints."""
    listed = _checkpoints_in(directory) if os.path.isdir(directory) else []
    return listed[0][0] if listed else None


def newest_fingerprint(directory: str) -> dict[str, Any] | None:
    """Returns the fingerprint in the newest checkpoint of this format with a readable state; None if there is
    none. `load_newest` says what is wrong with the others."""
    for _, name in _checkpoints_in(directory) if os.path.isdir(directory) else []:
        with contextlib.suppress(ValueError, OSError):
            with open(os.path.join(directory, name, STATE_NAME), "rb") as file:
                content = decode(file.read())
            fingerprint = content.get("fingerprint")
            if content.get("format_version") == FORMAT_VERSION and isinstance(fingerprint, dict):
                return fingerprint
    return None


def _checkpoints_in(directory: str) -> list[tuple[int, str]]:
    """Returns the checkpoints of a directory as (step, name), newest first."""
    matches = ((_NAME.fullmatch(name), name) for name in os.listdir(directory))
    return sorted(((int(match[1]), name) for match, name in matches if match), reverse=True)


def _read(path: str) -> Checkpoint:
    """Reads and checks a checkpoint. Raises ValueError if it is damaged; the message continues the sentence
    "checkpoint PATH ...". Raises UserError if another version wrote it."""
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
    if not isinstance(files, dict) or set(content) != {field.name for field in fields(RunState)}:
        raise ValueError(f"has a {STATE_NAME} with missing or unknown fields")
    run_state = RunState(**content)
    if os.path.basename(path) != checkpoint_name(run_state.step):
        raise ValueError(f"holds step {run_state.step}, which is not the step in its name")
    return Checkpoint(path, run_state, {name: _read_tensors(path, name, files) for name in TENSORS})


def _read_tensors(path: str, name: str, digests: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the tensors of one file, by parameter name. Raises ValueError as `_read` does."""
    file = f"{name}.safetensors"
    file_path = os.path.join(path, file)
    if not os.path.isfile(file_path):
        raise ValueError(f"has no {file}")
    if os.path.getsize(file_path) == 0:
        raise ValueError(f"has an empty {file}")
    if storage.digest_file(file_path) != digests.get(file):
        raise ValueError(f"has a {file} that does not match its digest")
    try:
        tensors = load_file(file_path)
    except (SafetensorError, OSError) as problem:
        raise ValueError(f"has a {file} that cannot be read ({problem})") from None
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise ValueError(f"has a {file} whose tensors are not float32")
    return tensors


def _rename_damaged(path: str) -> str:
    """Renames a damaged checkpoint and returns the new name without its directory."""
    number = 1
    while os.path.exists(f"{path}.damaged-{number}"):
        number += 1
    try:
        os.rename(path, f"{path}.damaged-{number}")
    except OSError as problem:
        raise UserError(f"{path}: is damaged and cannot be renamed ({problem}); fix access") from None
    return os.path.basename(f"{path}.damaged-{number}")


def _discard(path: str) -> None:
    """Removes a checkpoint, renamed first, so that a crash leaves no partial one under its name."""
    renamed = os.path.join(os.path.dirname(path), f"{storage.UNFINISHED}{secrets.token_hex(6)}")
    os.rename(path, renamed)
    shutil.rmtree(renamed, ignore_errors=True)
