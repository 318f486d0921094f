"""Builds the browser page from its TypeScript sources with Node, once per version of the sources.

The built page is not part of the package, because it contains a runtime of several megabytes from the npm
registry. ``npm ci`` installs exactly the packages of package-lock.json, without running their scripts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from infra.cpu.native import user_cache
from infra.errors import UserError
from infra.files.locks import locked

SOURCES = Path(__file__).parent / "page"
TIMEOUT_SECONDS = 600.0
"""Longest time that one npm command may take."""
OLDEST_NODE = 20
"""Oldest major version of Node with which the build was tested."""


def built_page() -> Path:
    """Returns the directory of the built page. If it is missing, one process builds it and others wait.

    Raises UserError if Node is missing or too old, or if the build fails, for example without a network.
    """
    files = source_files()
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(SOURCES)}\0".encode() + path.read_bytes())
    cache = user_cache()
    target = cache / f"page-{digest.hexdigest()[:32]}"
    if not target.exists():
        npm = _require_node()
        with locked(str(cache / ".page.lock")):
            if not target.exists():  # another process may have built it meanwhile
                _build(npm, files, target)
    return target


def source_files() -> list[Path]:
    """Returns the files that a build reads."""
    paths = [*SOURCES.glob("*.json"), *SOURCES.glob("*.mjs"), *(SOURCES / "src").iterdir()]
    return sorted(path for path in paths if path.is_file())


def _require_node() -> str:
    """Returns the path of npm. Raises UserError if Node is missing or too old."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise UserError(
            f"export --web: Node is not installed; install Node {OLDEST_NODE} or newer with npm, for example "
            "from https://nodejs.org"
        )
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout.strip()
    major = version.removeprefix("v").partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST_NODE:
        raise UserError(f"export --web: Node is {version or 'broken'}; install Node {OLDEST_NODE} or newer")
    return npm


def _build(npm: str, files: list[Path], target: Path) -> None:
    """Builds the page in a copy of its sources and moves the result to ``target``."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".page-") as draft:
        for path in files:
            copy = Path(draft) / path.relative_to(SOURCES)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
        _run([npm, "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"], draft)
        _run([npm, "run", "build"], draft)
        os.replace(Path(draft) / "build" / "site", target)


def _run(command: list[str], directory: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"export --web: {' '.join(command[1:3])} took over {TIMEOUT_SECONDS:.0f} s; run it again"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        message = next((line for line in lines if "error" in line.lower()), (lines or ["no message"])[0])
        raise UserError(f"export --web: {' '.join(command[1:3])} failed: {message.strip()[:200]}")
