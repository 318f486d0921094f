"""Joins a Ray cluster or starts a local one; if neither is possible, raises a clear error at once."""

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

from infra.console import keeping_sigterm_handler
from infra.errors import UserError

CONNECT_SECONDS = 5.0
"""Seconds in which a cluster's port must answer. Ray itself would try for many minutes."""
DIRECTORY_BYTES = 107 - len("/session_2026-11-27_17-05-00_123456_1234567/sockets/plasma_store")
"""Largest length of the path of Ray's directory, since the path of a socket in it can have 107 bytes."""
SYSTEM_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")
_ROOT = Path(__file__).resolve().parents[1]


def connect(address: str | None, setting: str, packages: Sequence[str], **local: Any) -> str | None:
    """Joins the cluster at ``address``, or the one this process belongs to; else starts a local Ray.

    ``setting``: name of the recipe's setting for the address. ``packages``: packages of this repository that
    are sent to the nodes of a cluster if they are not installed there. ``local``: arguments of ``ray.init``
    for a local Ray. Returns the address of the joined cluster, or None for a local Ray. Raises UserError if
    the cluster at ``address`` does not answer, or if no local Ray can be started.
    """
    import ray

    if os.environ.get("RAY_ADDRESS") and address in (None, "auto"):  # ray.init does the same
        setting, address = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster_address = _cluster_at(address, setting)
    with keeping_sigterm_handler():
        try:
            if cluster_address is None:
                quiet |= {"include_dashboard": False, "_temp_dir": _temporary_directory(), **local}
                # Ray itself would store a token in the home directory, readable by all users.
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
                ray.init(address="local", **quiet)
            else:
                _print_note(f"joining the Ray cluster at {cluster_address}")
                paths = [str(_ROOT / name) for name in packages]
                ray.init(address=cluster_address, runtime_env={"py_modules": paths}, **quiet)
        except (ConnectionError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{setting}: {address or 'the head on this machine'} answers, but Ray cannot join it"
                f" ({reason}); if the cluster asks for a token, set RAY_AUTH_MODE=token"
            ) from None
        except Exception as error:  # Ray raises no more specific type for a timeout
            if "timed out during startup" not in str(error):
                raise
            reason = "the machine may be overloaded: run the command again"
            raise UserError(f"Ray did not start within 30 seconds; {reason}") from None
    return cluster_address


def python_path() -> str:
    """Returns a PYTHONPATH with which local workers find this repository from any working directory."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _cluster_at(address: str | None, setting: str) -> str | None:
    """Returns the address of the cluster to join, or None if there is none. If ``address`` is None, this is
    the head that the same user started on this machine. Ray's own "auto" is not used, because it would also
    find the private Ray of another process. Raises UserError if no cluster answers at ``address``."""
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
            return None  # Ray's address file is unreadable, or names a head that no longer runs
        remedy = "start it, or leave the setting out"
        raise UserError(f"{setting}: no Ray cluster answers at {address}; {remedy}") from None
    if address is None and _owner(port) != os.getuid():
        _print_note(f"not joining another user's Ray head at {url}; to join it, set RAY_ADDRESS={url}")
        return None
    token_needed = _asks_for_token(host, port)
    if token_needed is None:
        if address is None:
            return None
        ports = "a head's default port is 6379, and 10001 for ray://"
        raise UserError(f"{setting}: the server at {address} is not a Ray head; {ports}")
    if token_needed:
        _enable_token(f"{setting}: the Ray cluster at {url}")
    return url


def _owner(port: int) -> int | None:
    """Returns the id of the user who listens at a port of this machine. If the head is on another machine,
    returns the id of the user who wrote Ray's address file on this one."""
    from ray._private.utils import get_ray_address_file

    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()  # local address, remote address, state (0A: listening) ... user id
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                return int(fields[7])
    address_file = Path(get_ray_address_file(None))
    return address_file.stat().st_uid if address_file.exists() else None


def _asks_for_token(host: str, port: int) -> bool | None:
    """Returns whether a Ray head asks for a token, or None if the server does not speak gRPC. With TLS it
    returns False, and Ray itself reports a missing token."""
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


def _enable_token(where: str) -> None:
    """Makes `ray.init` send this user's token, which it otherwise does only if RAY_AUTH_MODE is set. Raises
    UserError, which begins with ``where``, if the user has no token."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
        raise UserError(
            f"{where} asks for a token and got none; put the cluster's token into ~/.ray/auth_token, and"
            " unset RAY_AUTH_MODE or set it to token"
        )


def host_and_port(address: str) -> tuple[str, int]:
    """Splits ``host:port`` or ``ray://host:port``. Raises ValueError for any other text."""
    url = urlsplit(address if "://" in address else f"ray://{address}")
    if url.scheme != "ray" or not url.hostname or not url.port:
        raise ValueError(address)
    return url.hostname, url.port


def _temporary_directory() -> str:
    """Returns a directory for the files of a local Ray: writable, and short enough for the paths of sockets.
    Ray's own choices (RAY_TMPDIR, TMPDIR) come first. Raises UserError if no directory is suitable."""
    configured = [os.environ[name] for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    for parent in (*configured, *SYSTEM_DIRECTORIES):
        path = os.path.join(os.path.abspath(parent), "ray")
        writable = path if os.path.exists(path) else parent
        if len(os.fsencode(path)) <= DIRECTORY_BYTES and os.access(writable, os.W_OK | os.X_OK):
            return path
    raise UserError(
        f"RAY_TMPDIR: Ray needs a writable directory with a path of at most {DIRECTORY_BYTES - 4} bytes;"
        f" {', '.join([*configured, *SYSTEM_DIRECTORIES])} cannot be used, set RAY_TMPDIR to another"
    )


def _print_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
