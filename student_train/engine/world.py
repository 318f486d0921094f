"""The ranks (processes that train together): how they start, and how they exchange messages."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from infra.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank and its connection to the others. Messages are in CPU memory, so no rank waits for a GPU."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where this rank computes."""
    cpu_group: dist.ProcessGroup | None = None
    """The process group for messages in CPU memory; None: torch's default group."""

    @property
    def is_rank_0(self) -> bool:
        return self.rank == 0

    def max(self, values: list[float]) -> list[float]:
        """Returns the elementwise maximum over all ranks. All ranks call it."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def sum(self, values: list[float]) -> list[float]:
        """Returns the elementwise sum over all ranks. All ranks call it."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: list[float], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self.cpu_group)
        return tensor.tolist()

    def broadcast_text(self, source: int, text: str) -> str:
        """Returns the ``text`` that rank ``source`` gives. All ranks call it."""
        data = text.encode()
        size = torch.tensor([len(data)])
        dist.broadcast(size, source, group=self.cpu_group)
        if not size:
            return ""
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == source:
            buffer.copy_(torch.tensor(list(data), dtype=torch.uint8))
        dist.broadcast(buffer, source, group=self.cpu_group)
        return bytes(buffer.tolist()).decode()

    def on_rank_0(self, function: Callable[[], str | None]) -> str:
        """Runs ``function`` on rank 0. All ranks call it, and return its text or raise its UserError."""
        text, problem = "", ""
        if self.is_rank_0:
            try:
                text = function() or ""
            except UserError as error:
                problem = str(error)
        problem = self.broadcast_text(0, problem)
        if problem:
            raise UserError(problem)
        return self.broadcast_text(0, text)

    def raise_on_all_ranks(self, problem: str) -> None:
        """Raises UserError, the same on all ranks, if any has a ``problem``. All ranks call it."""
        failed = int(self.max([float(self.size - self.rank) if problem else 0.0])[0])
        if failed:
            raise UserError(self.broadcast_text(self.size - failed, problem))

    def on_all_ranks(self, function: Callable[[], T]) -> T:
        """Returns what ``function`` returns. If it raises UserError on any rank, all ranks raise it."""
        result: list[T] = []
        problem = ""
        try:
            result.append(function())
        except UserError as error:
            problem = str(error)
        self.raise_on_all_ranks(problem)
        return result[0]

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self.sum([0.0])

    def close(self) -> None:
        """Ends the connection to the other ranks."""
        dist.destroy_process_group()


def start_world() -> World:
    """Connects the ranks that the launcher (deepspeed, torchrun) started; without a launcher, starts one
    rank. Raises UserError if another program uses the launcher's port."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "RANK" not in os.environ:
        one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(one_rank, MASTER_PORT=str(free_port()))
    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _require_free_port(int(os.environ["MASTER_PORT"]))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed would build its shared-memory operator, which only `inference_all_reduce` uses. The build
    # takes a silent minute, and hangs if a killed build left its lock file.
    deepspeed.ops.__compatible_ops__ = {}
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    with deepspeed_quiet():
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    cpu_group = dist.new_group(backend="gloo") if on_gpu else None
    return World(dist.get_rank(), dist.get_world_size(), device, cpu_group)


@contextlib.contextmanager
def deepspeed_quiet() -> Iterator[None]:
    """A context that keeps what DeepSpeed prints off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def free_port() -> int:
    """Returns a TCP port of this machine that no program uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _require_free_port(port: int) -> None:
    """Raises UserError if the port is in use: torch would connect to the other program and could hang."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port closed just now is free
                probe.bind(("", port))  # on every address, as torch does, without listening
        except OSError as problem:
            if problem.errno != errno.EADDRINUSE:
                continue  # this machine lacks the address family
            raise UserError(
                f"--master_port: another program uses port {port}; give a free one, for example"
                f" deepspeed --master_port {port + 1} ... (without a launcher: MASTER_PORT={port + 1})"
            ) from None
