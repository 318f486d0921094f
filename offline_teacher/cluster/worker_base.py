"""The base class of workers: it returns errors as plain data and removes temporary files."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import traceback
from typing import Any

from infra.errors import NodeError, UserError
from infra.files.os_errors import as_node_error
from infra.files.scratch import Scratch

USER, NODE, ITEM = "user", "node", "item"
"""The cause of an error: the recipe, corpus or model (``user``); one machine (``node``); one item."""
LONGEST_REASON = 500
LONGEST_TRACEBACK = 20_000
"""Both limits are in characters."""
ACCELERATOR_ERRORS = {"OutOfMemoryError", "AcceleratorError", "CudaError", "DeferredCudaCallError"}
"""Names of torch's exceptions; by name, because this module does not import torch."""


class Guarded:
    """Base of a worker's class: ``call`` runs one of its methods and never raises.

    All its temporary files are in one directory. If the worker is killed, the next worker on the machine
    removes that directory.
    """

    device = "cpu"
    _scratch: Scratch | None = None
    _lock = threading.Lock()

    def call(self, method: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """``{result, host, device}``, or ``{error, reason, traceback, exit_code, host, device}``."""
        place = {"host": socket.gethostname(), "device": self._device()}
        try:
            self._own_scratch()
            return {"result": getattr(self, method)(*arguments), **place}
        except Exception as error:  # noqa: BLE001 - no error may stop the other workers
            return {**described(error), **place}

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.close()

    def _own_scratch(self) -> None:
        with self._lock:
            if self._scratch is None:
                self._scratch = Scratch()
                tempfile.tempdir = self._scratch.path

    def _device(self) -> str:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return self.device if self.device == "cpu" else f"{self.device}:{gpus}"


def described(error: Exception) -> dict[str, Any]:
    """Converts an error to plain data for the driver and the log."""
    trace = "".join(traceback.format_exception(error))[-LONGEST_TRACEBACK:]
    if isinstance(error, OSError):
        error = as_node_error(error, str(error.filename or tempfile.gettempdir()))
    own_words = isinstance(error, UserError)
    reason = " ".join(str(error).split())[:LONGEST_REASON]
    return {
        "error": fault_of(error),
        "reason": reason if own_words else f"{type(error).__name__}: {reason}",
        "traceback": trace,
        "exit_code": error.exit_code if isinstance(error, UserError) else None,
    }


def fault_of(error: Exception) -> str:
    """``user``, ``node`` or ``item``.

    A failing accelerator, or one without free memory, counts as the node's fault. After such an error the
    process cannot compute any more.
    """
    if isinstance(error, NodeError | OSError | MemoryError):
        return NODE
    if isinstance(error, UserError):
        return USER
    if type(error).__name__ in ACCELERATOR_ERRORS or "CUDA" in str(error):
        return NODE
    return ITEM
