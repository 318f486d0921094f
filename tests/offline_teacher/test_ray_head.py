"""A pass ends with its own line, in time, when Ray's head is lost."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from offline_teacher.cluster.ray_head import LOST_SECONDS, HeadLost, RayHead


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_head_is_lost_once_it_has_not_answered_for_long_enough(
    listening: socket.socket, scheme: str
) -> None:
    port = listening.getsockname()[1]
    head = RayHead(f"{scheme}127.0.0.1:{port}", now=0.0)
    head.raise_if_lost(10 * LOST_SECONDS)
    listening.close()
    head.raise_if_lost(11 * LOST_SECONDS - 0.1)
    with pytest.raises(HeadLost, match=f"127.0.0.1:{port} is lost .Connection refused.; start a new one"):
        head.raise_if_lost(11 * LOST_SECONDS)


def test_a_head_that_answers_again_is_given_its_whole_time_anew(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    head = RayHead(f"127.0.0.1:{port}", now=0.0)
    listening.close()
    head.raise_if_lost(LOST_SECONDS - 1)
    with socket.create_server(("127.0.0.1", port)):
        head.raise_if_lost(LOST_SECONDS)
    head.raise_if_lost(2 * LOST_SECONDS - 1)
    with pytest.raises(HeadLost):
        head.raise_if_lost(2 * LOST_SECONDS)
