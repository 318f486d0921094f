"""Joins a Ray cluster or starts one; if that is impossible, raises a clear error at once."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.console import sigterm_kept
from infra.errors import UserError

CONNECT_SECONDS = 5.0
"""Seconds that a cluster's port has to answer. Ray itself would try for many minutes."""
DIRECTORY_BYTES = 107 - len("/session_2026-11-27_17-05-00_123456_1234567/sockets/plasma_store")
"""For the path of Ray's directory: a socket's path has room for 107 bytes."""
SYSTEM_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")
_ROOT = Path(__file__).resolve().parents[1]


def connect(address: str | None, setting: str, packages: Sequence[str], **local: Any) -> str | None:
    """Joins the cluster at ``address`` or the one this process belongs to; else starts a local Ray.

    ``setting``: the name of the address in a recipe. ``packages``: the packages of this repository that are
    sent to the nodes of a cluster if they are not installed there. ``local``: arguments of ``ray.init`` for a
    local Ray. Returns the address of the joined cluster; None: a local Ray. Raises UserError if a named
    cluster does not answer, or if no local one can be started.
    """
    import ray

    if os.environ.get("RAY_ADDRESS") and address in (None, "auto"):  # as ray.init has it
        setting, address = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    found = _cluster_at(address, setting)
    with sigterm_kept():
        try:
            if found is None:
                quiet |= {"include_dashboard": False, "_temp_dir": _temporary_directory(), **local}
                # Ray would keep one in the home directory, readable by everybody.
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
                ray.init(address="local", **quiet)
            else:
                _say(f"joining the Ray cluster at {found}")
                paths = [str(_ROOT / name) for name in packages]
                ray.init(address=found, runtime_env={"py_modules": paths}, **quiet)
        except (ConnectionError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{setting}: {address or 'the head on this machine'} answers, but this user can join no Ray"
                f" cluster ({reason}); set RAY_AUTH_MODE=token where it asks for one"
            ) from None
        except Exception as error:  # no type of its own
            if "timed out during startup" not in str(error):
                raise
            raise UserError(
                "Ray did not start within 30 seconds; the machine may be overloaded: run the command again"
            ) from None
    return found


def python_path() -> str:
    """For local workers, wherever the command was started from."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _cluster_at(address: str | None, setting: str) -> str | None:
    """The address of the cluster to join, or None. Raises UserError if a named cluster does not answer.

    Without a name it is the head on this machine that the same user started. "auto" is not used, because it
    would find the private Ray of any other process.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        if address not in (None, "auto", "local"):
            host_and_port(str(address))
        url = address if address and "://" in address else canonicalize_bootstrap_address(address)  # type: ignore[arg-type]
        if url is None:
            return None
        host, port = host_and_port(url)
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except ValueError:
        raise UserError(f"{setting}: {address} is not host:port, ray://host:port, auto or local") from None
    except OSError:
        if address is None:
            return None  # the note of a head that is gone, or that this user may not read
        raise UserError(
            f"{setting}: no Ray cluster answers at {address}; start it, or leave it out"
        ) from None
    if address is None and _owner(port) != os.getuid():
        _say(f"the Ray head at {url} is another user's and is not joined (RAY_ADDRESS={url} joins it)")
        return None
    asks = _asks_for_token(host, port)
    if asks is None:
        if address is None:
            return None
        raise UserError(
            f"{setting}: the server at {address} is no Ray head; a head's default port is 6379, and 10001"
            " for ray://"
        )
    if asks:
        _take_token(f"{setting}: the Ray cluster at {url}")
    return url


def _owner(port: int) -> int | None:
    """The id of the user who listens at a port of this machine; for a remote head, of the user who joined
    it."""
    from ray._private.utils import get_ray_address_file

    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()  # local address, remote address, state (0A: listens) ... user id
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                return int(fields[7])
    note = Path(get_ray_address_file(None))
    return note.stat().st_uid if note.exists() else None


def _asks_for_token(host: str, port: int) -> bool | None:
    """Whether a Ray head asks for a token; None if the server speaks no gRPC. With TLS the check is left to
    Ray."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return False
    name = f"[{host}]" if ":" in host else host
    channel = grpc.insecure_channel(f"{name}:{port}", options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=CONNECT_SECONDS)
    except grpc.FutureTimeoutError:
        return None
    except grpc.RpcError as refusal:
        return bool(refusal.code() is grpc.StatusCode.UNAUTHENTICATED)
    finally:
        channel.close()
    return False


def _take_token(where: str) -> None:
    """`ray.init` shows this user's token only where RAY_AUTH_MODE says so; UserError where there is none."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
        raise UserError(
            f"{where} asks for a token and got none; put the cluster's token into ~/.ray/auth_token, and"
            " unset RAY_AUTH_MODE or set it to token"
        )


def host_and_port(address: str) -> tuple[str, int]:
    """Of host:port or ray://host:port. Raises ValueError."""
    url = urlsplit(address if "://" in address else f"ray://{address}")
    if url.scheme != "ray" or not url.hostname or not url.port:
        raise ValueError(address)
    return url.hostname, url.port


def _temporary_directory() -> str:
    """Where a Ray of our own keeps its files: where it would, or else where it can write, and sockets fit."""
    named = [os.environ[name] for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    for parent in (*named, *SYSTEM_DIRECTORIES):
        path = os.path.join(os.path.abspath(parent), "ray")
        writable = path if os.path.exists(path) else parent
        if len(os.fsencode(path)) <= DIRECTORY_BYTES and os.access(writable, os.W_OK | os.X_OK):
            return path
    raise UserError(
        f"RAY_TMPDIR: Ray needs a writable directory with a path of at most {DIRECTORY_BYTES - 4} bytes;"
        f" {', '.join([*named, *SYSTEM_DIRECTORIES])} cannot be used, set RAY_TMPDIR to one"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
