"""Joining a Ray cluster or starting one, and one clear line at once where that cannot be."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.console import sigterm_kept
from infra.errors import UserError
from infra.sections import Teacher

CONNECT_SECONDS = 5.0
"""For a cluster's port to answer. Ray itself tries for many minutes."""


def connect(settings: Teacher) -> bool:
    """Joins the cluster named in the recipe or the one this process belongs to; else starts a local Ray.

    True where it joined one.
    """
    import ray

    where, address = "teacher.ray_address", settings.ray_address
    if os.environ.get("RAY_ADDRESS") and address in (None, "auto"):  # as ray.init has it
        where, address = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    joins = _answers(where, address)
    with sigterm_kept():
        try:
            if joins:
                ray.init(address=address, runtime_env={"py_modules": _packages()}, **quiet)
            else:
                cpus = settings.workers * settings.cpu_threads
                quiet |= {"include_dashboard": False, "object_store_memory": 100 << 20}
                ray.init(address="local", num_cpus=cpus, **quiet)
        except (ConnectionError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{where}: {address or 'the head on this machine'} answers, but lets this user in to no Ray"
                f" cluster ({reason}); set RAY_AUTH_MODE=token where it asks for one"
            ) from None
        except Exception as error:  # no type of its own
            if "timed out during startup" not in str(error):
                raise
            raise UserError(
                "Ray did not start within 30 seconds; the machine is overloaded: the same command tries again"
            ) from None
    return joins


def _answers(where: str, address: str | None) -> bool:
    """Whether there is a cluster to join; UserError where one is named, and nothing answers there.

    None is the head that is noted on this machine. Not "auto", which would be the private Ray of any other
    process.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        if address not in (None, "auto", "local"):
            _host_and_port(str(address))
        url = address if address and "://" in address else canonicalize_bootstrap_address(address)  # type: ignore[arg-type]
        if url is None:
            return False
        host, port = _host_and_port(url)
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except ValueError:
        raise UserError(f"{where}: {address} is not host:port, ray://host:port, auto or local") from None
    except OSError:
        if address is None:
            return False  # the note of a head that is gone
        raise UserError(f"{where}: no Ray cluster answers at {address}; start it, or leave it out") from None
    if not _speaks_grpc(host, port):
        if address is None:
            return False
        raise UserError(
            f"{where}: what answers at {address} is no Ray head, whose port is 6379, that of ray:// 10001,"
            " unless it was started with another"
        )
    return True


def _speaks_grpc(host: str, port: int) -> bool:
    """As a Ray head does; with TLS that takes certificates, and is left to Ray."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True
    name = f"[{host}]" if ":" in host else host
    channel = grpc.insecure_channel(f"{name}:{port}", options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


def _host_and_port(address: str) -> tuple[str, int]:
    url = urlsplit(address if "://" in address else f"ray://{address}")
    if url.scheme != "ray" or not url.hostname or not url.port:
        raise ValueError(address)
    return url.hostname, url.port


def refuse_too_few_gpus(settings: Teacher) -> None:
    """Of a Ray of our own, to which no machine comes later. It is given the CPUs that it is asked for."""
    import ray

    share, there = settings.gpus_per_worker, int(ray.cluster_resources().get("GPU", 0))
    if not share:
        return
    workers = there // int(share) if share >= 1 else there * int(1 / share + 1e-9)
    if workers < settings.min_workers:
        raise UserError(
            f"teacher.gpus_per_worker: {share:g} for each of teacher.min_workers = {settings.min_workers}"
            f" workers, but Ray finds {there} GPUs on this machine; ask for less, or join a cluster"
            " (teacher.ray_address)"
        )


_ROOT = Path(__file__).resolve().parents[1]


def _packages() -> list[str]:
    """What the nodes of a cluster need of us where we are not installed."""
    return [str(_ROOT / "offline_teacher"), str(_ROOT / "infra")]


def python_path() -> str:
    """For local workers, wherever the command was started from."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
