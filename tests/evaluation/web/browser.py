"""The page's own tests in headless Chromium: their packages, an HTTP server for a folder, and one visit."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaluation.web.page_bundle import SOURCES, source_files
from infra.cpu.native import user_cache

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Missing(Exception):
    """Node, Chromium or the npm registry is not there."""


def page_tests() -> Path:
    """A copy of the page's sources, with the packages of its own tests. Raises Missing."""
    npm = shutil.which("npm")
    if npm is None or CHROMIUM is None:
        raise Missing("Node or Chromium is not installed")
    sources = [*source_files(), *sorted((SOURCES / "tests").iterdir())]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:32]
    target = user_cache() / f"page-tests-{digest}"
    if not (target / "ready").exists():
        for path in sources:
            copy = target / path.relative_to(SOURCES)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        if subprocess.run(command, cwd=target, capture_output=True).returncode:
            raise Missing("the page's packages cannot be installed here")
        (target / "ready").touch()
    return target


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(directory: Path | str) -> Iterator[str]:
    """The address of a server of this folder."""
    handler = functools.partial(_Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def visit(tests: Path, address: str, step: str, query: str = "") -> dict[str, Any]:
    """What one step of ``visit.mjs`` found; ``tests``: from `page_tests`."""
    command = ["node", "tests/visit.mjs", address, str(CHROMIUM), step, query]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
