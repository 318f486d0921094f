"""Detects a lost Ray head before Ray itself ends the process with a line of its own."""

from __future__ import annotations

import socket

from infra.errors import UserError
from infra.ray_cluster import host_and_port

LOST_SECONDS = 30.0
"""A head that has not answered for this long is lost. After 60 seconds Ray ends the driver."""
CONNECT_SECONDS = 2.0


class HeadLost(UserError):
    """The head is gone. Ray must not be called any more, even to clean up: calls fail or do not return."""


class Head:
    """The head of a cluster that the pass has joined, by its address: host:port or ray://host:port."""

    def __init__(self, address: str, now: float) -> None:
        self.address, self._answered = address, now

    def raise_if_lost(self, now: float) -> None:
        """Raises HeadLost if the head has not answered for LOST_SECONDS. ``now``: seconds, monotonic."""
        try:
            socket.create_connection(host_and_port(self.address), CONNECT_SECONDS).close()
            self._answered = now
        except OSError as problem:
            if now - self._answered >= LOST_SECONDS:
                raise HeadLost(
                    f"the head of the Ray cluster at {self.address} is lost"
                    f" ({problem.strerror or problem}); start a new one, then the same command keeps every"
                    " finished task"
                ) from None
