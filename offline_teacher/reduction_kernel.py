"""The compiled reduction of logits on a CPU: ``reduction_kernel.cpp``, built once and called through ctypes.

It is built by the machine's C++ compiler for the machine's processor, in a second or two, when it is first
needed, and kept in the user's cache under a name that says what it was made from. Where that fails there is
one warning, and the callers' tensor arithmetic does the same work more slowly.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
COMPILERS = ("g++", "c++", "clang++")
FUNCTIONS = {torch.float32: "reduce_float32", torch.bfloat16: "reduce_bfloat16"}
BUILD_SECONDS = 120.0


def available() -> bool:
    """Whether the kernel can be used; builds it when first asked."""
    return _library() is not None


def reduce_logits(
    logits: Tensor, top_k: int, temperatures: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reduction.reduce_logits`; rows are shared among torch's threads."""
    if logits.dtype not in FUNCTIONS:
        logits = logits.float()
    count, vocab_size = logits.shape
    assert logits.is_contiguous()
    assert 0 < top_k <= vocab_size
    ids = torch.zeros(count, top_k, dtype=torch.int64)
    values, sums = torch.full((count, top_k), torch.nan), torch.empty(count, len(temperatures))
    scales = torch.tensor(temperatures, dtype=torch.float32)
    function = getattr(_library(), FUNCTIONS[logits.dtype])

    def reduce(rows: slice) -> None:
        mine = logits[rows]
        function(
            mine.data_ptr(), len(mine), vocab_size, top_k, scales.data_ptr(), len(temperatures),
            ids[rows].data_ptr(), values[rows].data_ptr(), sums[rows].data_ptr(),
        )  # fmt: skip

    _in_threads(reduce, count, torch.get_num_threads())
    return ids, values, sums


def _in_threads(reduce: Callable[[slice], None], count: int, threads: int) -> None:
    """ctypes lets go of the interpreter's lock while the kernel runs."""
    if threads == 1 or count < threads:
        reduce(slice(0, count))
        return
    cuts = [count * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(reduce, (slice(*pair) for pair in zip(cuts, cuts[1:], strict=False))))


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"top-k and logsumexp run uncompiled, several times slower: {_reason(error)}; install a C++"
            " compiler, for example apt-get install g++",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    for name in FUNCTIONS.values():
        function = getattr(library, name)
        function.restype = None
        function.argtypes = [pointer, integer, integer, integer, pointer, integer, pointer, pointer, pointer]
    return library


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"the compiler failed ({error.stderr.strip().splitlines()[:1]})"
    return str(error)


def _built() -> Path:
    """The shared library, built if it is not there. Workers that build it at once publish the same file."""
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found")
    made_from = [SOURCE.read_text(), compiler, *FLAGS, _processor()]
    digest = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:32]
    target = _directory() / f"reduction-{digest}.so"
    if not target.exists():
        handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".unfinished")
        os.close(handle)
        try:
            command = [compiler, *FLAGS, "-o", temporary, str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return target


def _processor() -> str:
    """What -march=native depends on: homes are shared by machines of several kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *dict.fromkeys(kept or lines[:1])])


def _directory() -> Path:
    """The user's cache, private; where it cannot be written, a directory of this process's own."""
    home = Path(os.path.expanduser("~"), ".cache", "offline-encoder-distillation")
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(home, os.W_OK) and home.stat().st_uid == os.getuid():
            return home
    except OSError:
        pass
    own = tempfile.mkdtemp(prefix="offline-encoder-distillation-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)
