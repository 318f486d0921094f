"""A pass ends with its own line, in time, when Ray's head is lost."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from offline_teacher.cluster.head import LOST_SECONDS, Head, HeadLost


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_head_is_lost_once_it_has_not_answered_for_long_enough(
    listening: socket.socket, scheme: str
) -> None:
    port = listening.getsockname()[1]
    head = Head(f"{scheme}127.0.0.1:{port}", now=0.0)
    head.require(10 * LOST_SECONDS)
    listening.close()
    head.require(11 * LOST_SECONDS - 0.1)
    with pytest.raises(HeadLost, match=f"127.0.0.1:{port} is lost .Connection refused.; start a new one"):
        head.require(11 * LOST_SECONDS)


def test_a_head_that_answers_again_is_given_its_whole_time_anew(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    head = Head(f"127.0.0.1:{port}", now=0.0)
    listening.close()
    head.require(LOST_SECONDS - 1)
    with socket.create_server(("127.0.0.1", port)):
        head.require(LOST_SECONDS)
    head.require(2 * LOST_SECONDS - 1)
    with pytest.raises(HeadLost):
        head.require(2 * LOST_SECONDS)
