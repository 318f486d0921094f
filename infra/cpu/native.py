"""Builds this project's C++ sources for this processor when they are first used; calls go through ctypes.

The machine's compiler builds a library in seconds. The library is kept in the user's cache, under a name
derived from source, compiler and processor. If the build fails, there is one warning, and the caller uses
slower code. ``python -m infra.cpu.native`` builds all libraries in advance, for example after installation.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from infra.files.locks import locked

FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
HEADERS = Path(__file__).parent
PACKAGES = ("infra", "offline_teacher", "student_train", "evaluation")
"""Top-level packages whose folders contain C++ sources."""
COMPILERS = ("g++", "c++", "clang++")
BUILD_SECONDS = 120.0
"""Time limit of one build."""


def build_all() -> int:
    """Builds every library that is missing. Returns the exit code, 1 if a library cannot be built."""
    sources = sorted(path for name in PACKAGES for path in (HEADERS.parents[1] / name).rglob("*.cpp"))
    libraries = [load_library(source, f"{source.name} is not built") for source in sources]
    return 1 if None in libraries else 0


def load_library(
    source: Path, consequence: str, functions: Iterable[str] = (), arguments: Sequence[Any] = ()
) -> ctypes.CDLL | None:
    """Loads the library of ``source``, which is built if necessary. ``functions``: names of its functions
    that return nothing and take ``arguments`` (ctypes types). If the library cannot be built, returns None
    after a warning, which begins with ``consequence``."""
    try:
        loaded = ctypes.CDLL(str(_built(source)))
        for name in functions:
            function = getattr(loaded, name)
            function.restype, function.argtypes = None, arguments
        return loaded
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "install a C++ compiler, for example apt-get install g++"
        warnings.warn(f"{consequence}: {_reason(error)}; {remedy}", RuntimeWarning, stacklevel=2)
        return None


def in_threads(work: Callable[[slice], None], count: int, threads: int) -> None:
    """Calls ``work`` with slices that partition ``range(count)``, one per thread. The threads run in parallel
    because ctypes releases the interpreter's lock."""
    if threads == 1 or count < threads:
        work(slice(0, count))
        return
    cuts = [count * part // threads for part in range(threads + 1)]
    list(_pool(threads).map(work, (slice(*pair) for pair in zip(cuts, cuts[1:], strict=False))))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"the compiler failed ({error.stderr.strip().splitlines()[:1]})"
    return str(error)


def _built(source: Path) -> Path:
    """Returns the path of the shared library. If it is absent, one process builds it and the others wait."""
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found")
    sources = [source, *sorted(HEADERS.glob("*.hpp"))]
    made_from = [*(path.read_text("utf-8") for path in sources), compiler, *FLAGS, _processor()]
    digest = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:32]
    target = user_cache() / f"{source.stem}-{digest}.so"
    if not target.exists():
        with locked(str(target.parent / f".{source.stem}.lock")):
            if not target.exists():  # another process may have built it meanwhile
                _build(compiler, source, target)
    return target


def _build(compiler: str, source: Path, target: Path) -> None:
    print(f"building {source.name} for this processor, a few seconds", file=sys.stderr, flush=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".unfinished")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, f"-I{HEADERS}", "-o", temporary, str(source)]
        decoding: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}
        subprocess.run(command, check=True, capture_output=True, timeout=BUILD_SECONDS, **decoding)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _processor() -> str:
    """Describes what -march=native depends on, because different machines may share a home directory."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    features = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *dict.fromkeys(features or lines[:1])])


def user_cache() -> Path:
    """Returns the user's private cache directory, or a temporary directory if that cannot be written."""
    home = Path(os.path.expanduser("~"), ".cache", "offline-encoder-distillation")
    try:
        if not home.is_absolute():  # the user has no home directory
            raise FileNotFoundError(home)
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(home, os.W_OK) and home.stat().st_uid == os.getuid():
            return home
    except OSError:
        pass
    temporary = tempfile.mkdtemp(prefix="offline-encoder-distillation-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


@cache
def has_triton() -> bool:
    """Returns whether Triton, which torch for GPUs installs, can be imported, and finds the C compiler with
    which it builds the launcher of each kernel."""
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    return importlib.util.find_spec("triton") is not None and compiler is not None


if __name__ == "__main__":
    sys.exit(build_all())
