"""Puts one fault at a time into a module of evaluation, and lists the faults that its tests do not notice.

    python -m tests.mutation evaluation/measures/metrics.py
    python -m tests.mutation --seconds 400 evaluation/tasks evaluation/submission.py

Each fault is tried in a separate process, which runs the module's tests until one fails. If no test notices a
fault, either the fault changes no result or a test is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tests.mutation.mutants import Mutant, mutants

TESTS = {
    "evaluation/measures": (
        "test_metrics", "test_measures", "test_calibration", "test_ranking_and_entities", "test_predictions",
        "test_references",
    ),
    "evaluation/tasks": (
        "test_official", "test_bad_official", "test_squad", "test_bad_tasks", "test_hub_tasks",
    ),
    "evaluation/submission.py": ("test_submission",),
}  # fmt: skip
"""Module or folder -> files of tests/evaluation that test it."""
PACKAGES = (
    "pyarrow.parquet",
    "pydantic",
    "scipy.stats",
    "sklearn.metrics",
    "torch",
    "transformers",
    "datasets",
)
"""Packages that are imported once, before the processes of the faults are forked."""


class Faulty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Replaces the source of one module when it is imported."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.module = ".".join(path.with_suffix("").parts)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        mine = name == self.module
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if mine else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, self.path, "exec"), module.__dict__)


def is_noticed(path: Path, source: str, tests: Sequence[str], limit: int) -> bool:
    """Returns whether the tests notice the fault: in a child process, with ``source`` as the content of
    ``path``, they fail or take longer than ``limit`` seconds."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.meta_path.insert(0, Faulty(path, source))
        signal.alarm(limit)
        with tempfile.TemporaryDirectory() as base:
            code = pytest.main(["-qx", "-p", "no:cacheprovider", f"--basetemp={base}/tests", *tests])
        os._exit(code != 0)
    return os.waitpid(child, 0)[1] != 0


def survivors(path: Path, deadline: float) -> tuple[int, list[Mutant]]:
    """Tries faults in random order until the deadline. Returns the number of faults that were tried, and the
    faults that no test noticed."""
    folder = next(name for name in TESTS if str(path).startswith(name))
    tests = [f"tests/evaluation/{name}.py" for name in TESTS[folder]]
    source, started = path.read_text(), time.monotonic()
    if is_noticed(path, source, tests, 300):
        sys.exit(f"{path}: its tests fail without a fault")
    limit = 10 + int(5 * (time.monotonic() - started))
    found: list[Mutant] = []
    faults = list(mutants(source))
    random.Random(0).shuffle(faults)
    for tried, fault in enumerate(faults):
        if time.monotonic() > deadline:
            return tried, found
        if not is_noticed(path, fault.source, tests, limit):
            print(f"{path}:{fault}", flush=True)
            found.append(fault)
    return len(faults), found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, help="modules or folders of TESTS")
    parser.add_argument("--seconds", type=float, default=1e9, help="time limit in seconds")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    for package in PACKAGES:
        importlib.import_module(package)
    total, alive = 0, 0
    for given in options.paths:
        for path in sorted(given.glob("*.py")) if given.is_dir() else [given]:
            tried, found = survivors(path, deadline)
            total, alive = total + tried, alive + len(found)
            print(f"{path}: {tried - len(found)} of {tried} faults noticed", flush=True)
    print(f"{total - alive} of {total} faults noticed: {1 - alive / max(1, total):.1%}")


if __name__ == "__main__":
    main()
