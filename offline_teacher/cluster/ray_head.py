"""Detects that the head node of a Ray cluster is lost, before Ray itself ends the process."""

from __future__ import annotations

import socket

from infra.errors import UserError
from infra.ray_cluster import host_and_port

LOST_SECONDS = 30.0
"""A head that has not answered for this many seconds is lost. After 60 seconds Ray ends the driver."""
CONNECT_SECONDS = 2.0
"""Longest time, in seconds, for one attempt to connect."""


class HeadLost(UserError):
    """Raised if the head is lost. Ray must not be called any more, not even to clean up: calls may hang."""


class RayHead:
    """The head node of the joined cluster. ``address``: host:port or ray://host:port."""

    def __init__(self, address: str, now: float) -> None:
        self.address, self._answered = address, now

    def raise_if_lost(self, now: float) -> None:
        """Raises HeadLost if the head has not answered for LOST_SECONDS. ``now``: time.monotonic()."""
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
