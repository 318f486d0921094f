"""The base class of workers: returns errors as plain data, and removes temporary files."""

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
"""Causes of an error: the recipe, corpus or model (``user``); one machine (``node``); one item (``item``)."""
LONGEST_REASON = 500
"""Largest number of characters of a reason."""
LONGEST_TRACEBACK = 20_000
"""Largest number of characters of a traceback."""
ACCELERATOR_ERRORS = {"OutOfMemoryError", "AcceleratorError", "CudaError", "DeferredCudaCallError"}
"""Class names of torch's exceptions. Names are compared, because this module does not import torch."""


class WorkerBase:
    """Base class of workers. ``call`` runs a method of the worker and never raises.

    Its temporary files are in one directory, which the machine's next worker removes if it is killed.
    """

    device = "cpu"
    _scratch: Scratch | None = None
    _lock = threading.Lock()

    def call(self, method: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Runs a method. Returns ``{result, host, device}`` or, after an error, ``{error, reason, traceback,
        exit_code, host, device}``, where ``error`` is ``user``, ``node`` or ``item``."""
        place = {"host": socket.gethostname(), "device": self._device()}
        try:
            self._own_scratch()
            return {"result": getattr(self, method)(*arguments), **place}
        except Exception as error:  # noqa: BLE001 - no error may stop the other workers
            return {**error_as_data(error), **place}

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


def error_as_data(error: Exception) -> dict[str, Any]:
    """Converts an error to plain data, for the driver and the log."""
    trace = "".join(traceback.format_exception(error))[-LONGEST_TRACEBACK:]
    if isinstance(error, OSError):
        error = as_node_error(error, str(error.filename or tempfile.gettempdir()))
    reason = " ".join(str(error).split())[:LONGEST_REASON]
    return {
        "error": cause_of(error),
        "reason": reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}",
        "traceback": trace,
        "exit_code": error.exit_code if isinstance(error, UserError) else None,
    }


def cause_of(error: Exception) -> str:
    """Returns the cause of an error. Errors of an accelerator, out-of-memory included, are caused by the
    node: after such an error the process cannot compute any more."""
    if isinstance(error, NodeError | OSError | MemoryError):
        return NODE
    if isinstance(error, UserError):
        return USER
    if type(error).__name__ in ACCELERATOR_ERRORS or "CUDA" in str(error):
        return NODE
    return ITEM
