"""Which Ray is joined or started, and where: ``ray.init`` is recorded, heads are servers of this process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray

from infra import ray_cluster
from infra.errors import UserError
from infra.ray_cluster import connect

SETTING = "teacher.ray_address"


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """What ``ray.init`` was called with. No head is noted; what is set in the environment is taken back."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **given: calls.append(given))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    before = dict(os.environ)
    yield calls
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def refused() -> Iterator[int]:
    """A port at which nothing listens: it is bound, and refuses."""
    with socket.socket() as closed:
        closed.bind(("", 0))
        yield closed.getsockname()[1]


def serve(code: grpc.StatusCode = grpc.StatusCode.OK) -> tuple[Any, int]:
    """A server that answers what a Ray head is asked, and its port."""

    def answer(request: bytes, context: Any) -> bytes:
        if code is not grpc.StatusCode.OK:
            context.abort(code, "no")
        return b""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    head = grpc.server(ThreadPoolExecutor(1), handlers=[Handler()])
    port = head.add_insecure_port("0.0.0.0:0")
    head.start()
    return head, port


@pytest.fixture
def head() -> Iterator[int]:
    server, port = serve()
    yield port
    server.stop(None)


def note(tmp_path: Path, port: int) -> None:
    """As ``ray start --head`` does."""
    (tmp_path / "ray").mkdir(exist_ok=True)
    (tmp_path / "ray/ray_current_cluster").write_text(f"127.0.0.1:{port}")


def address_given(address: str, variable: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str | None]:
    """What names the address, the environment or the recipe, and the recipe's."""
    if not variable:
        return SETTING, address
    monkeypatch.setenv("RAY_ADDRESS", address)
    return "RAY_ADDRESS", None


@pytest.mark.parametrize(
    "address", ["nonsense", ":6379", "a:b", "http://127.0.0.1:8265", "ray://", "foo://x:1"]
)
@pytest.mark.parametrize("variable", [False, True])
def test_what_is_no_address_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], address: str, variable: bool
) -> None:
    where, given = address_given(address, variable, monkeypatch)
    with pytest.raises(UserError, match=f"^{where}: {address} is not host:port"):
        connect(given, SETTING, ())
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "no.such.host.invalid:{}"])
@pytest.mark.parametrize("variable", [False, True])
def test_an_address_where_nothing_answers_is_one_line(
    monkeypatch: pytest.MonkeyPatch, refused: int, form: str, variable: bool
) -> None:
    address = form.format(refused)
    where, given = address_given(address, variable, monkeypatch)
    with pytest.raises(UserError, match=f"^{where}: no Ray cluster answers at {address}"):
        connect(given, SETTING, ())


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_what_answers_and_is_no_ray_is_one_line(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("", 0)) as other:
        address = form.format(other.getsockname()[1])
        with pytest.raises(UserError, match=f"the server at {address} is not a Ray head"):
            connect(address, SETTING, ())


def test_a_head_of_this_user_is_joined_and_named(
    started: list[dict[str, Any]], tmp_path: Path, head: int, capfd: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, head)
    assert connect(None, SETTING, ("infra",))
    address = started[0]["address"]  # Ray puts this machine's for 127.0.0.1
    assert address.endswith(f":{head}")
    assert [Path(path).name for path in started[0]["runtime_env"]["py_modules"]] == ["infra"]
    assert capfd.readouterr().err == f"joining the Ray cluster at {address}\n"


def test_a_head_of_another_user_is_joined_only_by_its_name(
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    head: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    note(tmp_path, head)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert not connect(None, SETTING, ())
    assert started[0]["address"] == "local"
    assert "another user's" in capfd.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head}")
    assert connect(None, SETTING, ())


def test_what_is_not_joined(started: list[dict[str, Any]], tmp_path: Path, refused: int, head: int) -> None:
    """No note, the note of a dead head, and a living one where the recipe says local."""
    assert not connect(None, SETTING, ())
    note(tmp_path, refused)
    assert not connect(None, SETTING, ())
    note(tmp_path, head)
    assert not connect("local", SETTING, ())
    assert [call["address"] for call in started] == ["local"] * 3


def test_a_cluster_that_asks_for_a_token_is_shown_this_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server, port = serve(grpc.StatusCode.UNAUTHENTICATED)
    address = f"127.0.0.1:{port}"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match=f":{port} asks for a token and got none"):
        connect(address, SETTING, ())
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert connect(address, SETTING, ())
    server.stop(None)


def test_a_ray_of_our_own_needs_no_home_and_a_place_for_its_sockets(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    for directory in (str(long), "/dev/null/no", str(tmp_path / "absent")):
        monkeypatch.setenv("RAY_TMPDIR", directory)
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        assert not connect("local", SETTING, ())
        assert started[-1]["_temp_dir"] == f"{ray_cluster.SYSTEM_DIRECTORIES[0]}/ray"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.setattr(ray_cluster, "SYSTEM_DIRECTORIES", ())
    with pytest.raises(UserError, match="RAY_TMPDIR: Ray needs a writable directory"):
        connect("local", SETTING, ())
