"""A real S3 server process (moto's) on loopback, and a proxy in front of it that goes wrong on demand."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("500", "503", "reset", "torn", "cut", "wrong", "hang")
"""Server error, throttling, connection reset before the answer, connection reset while half of the request's
body is still on its way (an upload that dies), answer cut half-way, one bit of the answer changed, no answer
at all (until the proxy is closed)."""

Chooser = Callable[[str, str], str | None]
"""(method, path) -> the fault of this request, or None."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Yields the endpoint of an empty server; it ends with the context."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for_port(port: int, process: subprocess.Popen[Any], seconds: float = 60) -> None:
    """Returns once the process listens; raises when it ends or takes too long."""
    pause = threading.Event()
    for _ in range(int(seconds * 20)):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert process.poll() is None, "the server ended"
        pause.wait(0.05)
    raise AssertionError("the server does not listen")


class FaultyProxy:
    """A context: the same server at ``endpoint``, with the faults that ``choose`` picks."""

    def __init__(self, upstream: str, port: int = 0) -> None:
        self.choose: Chooser = lambda method, path: None
        self.seen: list[tuple[str, str, str | None]] = []
        self.sent = 0
        """Bytes of answers that were passed on."""
        self.latency = 0.0
        """Seconds that every request waits."""
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._luck = random.Random(0)
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler(urlsplit(upstream).netloc))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients go as they like
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def once(self, *faults: str | None, method: str = "GET", words: str = "") -> list[str | None]:
        """The next requests of this method whose path has these words meet these faults, one each; the faults
        not met yet."""
        left = list(faults)
        self.choose = lambda seen, path: left.pop(0) if seen == method and words in path and left else None
        return left

    def first_downloads(self, fault: str) -> set[str]:
        """From now on, the first download of every object meets this fault; the paths that met it."""
        met: set[str] = set()

        def choose(method: str, path: str) -> str | None:
            if method != "GET" or "?" in path or path in met:
                return None
            met.add(path)
            return fault

        self.seen.clear()
        self.choose = choose
        return met

    def often(self, share: float, seed: int, faults: tuple[str, ...]) -> None:
        """This share of all requests meets one of these faults."""
        generator = random.Random(seed)
        self.choose = lambda method, path: generator.choice(faults) if generator.random() < share else None

    def _decide(self, method: str, path: str) -> str | None:
        with self._lock:
            fault = self.choose(method, path)
            self.seen.append((method, path, fault))
            return fault

    def _changed(self, data: bytes) -> bytes:
        """With one bit of it flipped, each time another."""
        changed = bytearray(data)
        with self._lock:
            changed[self._luck.randrange(len(data))] ^= 1 << self._luck.randrange(8)
        return bytes(changed)

    def _handler(proxy, netloc: str) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - self is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                fault = proxy._decide(self.command, self.path)
                proxy.closing.wait(proxy.latency)
                if fault == "torn":
                    self.rfile.read(length // 2)
                    return self.reset()
                body = self.rfile.read(length)
                if fault == "hang":
                    proxy.closing.wait()
                if fault in ("hang", "reset"):
                    return self.reset()
                if fault in ("500", "503"):
                    return self.refuse(int(fault))
                upstream = http.client.HTTPConnection(netloc, timeout=60)
                with contextlib.closing(upstream):
                    upstream.request(self.command, self.path, body, dict(self.headers))
                    response = upstream.getresponse()
                    data = response.read()
                self.send_response_only(response.status, response.reason)
                dropped = {"transfer-encoding", "connection"} | (
                    {"content-length"} if self.command != "HEAD" else set()
                )
                for name, value in response.getheaders():
                    if name.lower() not in dropped and "checksum" not in name.lower():
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault == "wrong" and data and response.status < 300 and self.command == "GET":
                    data = proxy._changed(data)
                if fault == "cut":
                    self.wfile.write(data[: len(data) // 2])
                    return self.reset()
                self.wfile.write(data)
                with proxy._lock:
                    proxy.sent += len(data)
                return None

            def refuse(self, status: int) -> None:
                code, text = "InternalError", "We encountered an internal error."
                if status == 503:
                    code, text = "SlowDown", "Please reduce your request rate."
                data = f"<Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
                self.send_response_only(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def reset(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.wfile.flush()
                    linger = struct.pack("ii", 1, 0)  # close with RST instead of FIN
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        return Handler
