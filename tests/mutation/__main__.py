"""Puts one fault at a time into a module of evaluation, and lists those that its tests do not notice.

    python -m tests.mutation evaluation/measures/metrics.py
    python -m tests.mutation --seconds 400 evaluation/tasks evaluation/sources evaluation/submission.py

Each fault is put into the loaded module of a forked process, which runs the tests that reach its line, the
quickest first, until one fails. If none notices it, either a test is missing, or the fault changes no result.
``equivalents.tsv`` lists the faults of the second kind with the reason; the score is given with and without.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.mutation.in_place import put
from tests.mutation.mutants import Mutant, mutants

TESTS = {
    "evaluation/measures/calibration.py": ("test_calibration",),
    "evaluation/measures/entities.py": ("test_ranking_and_entities", "test_references"),
    "evaluation/measures/intervals.py": ("test_measures",),
    "evaluation/measures/metrics.py": ("test_metrics", "test_references"),
    "evaluation/kinds/predictions.py": ("test_predictions", "test_submission"),
    "evaluation/measures/ranking.py": ("test_ranking_and_entities", "test_references"),
    "evaluation/measures/resampling.py": ("test_measures", "test_references"),
    "evaluation/measures": ("test_predictions",),
    "evaluation/tasks/answer_spans.py": ("test_squad", "test_bad_official", "test_hub_tasks"),
    "evaluation/tasks/task.py": (
        "test_task", "test_official", "test_bad_official", "test_task_settings", "test_own_data"
    ),
    "evaluation/tasks/encoded.py": ("test_task",),
    **dict.fromkeys(
        ("evaluation/tasks/beir.py", "evaluation/tasks/examples.py", "evaluation/tasks/row_files.py",
         "evaluation/sources/own.py"),
        ("test_bad_tasks", "test_task_settings", "test_own_data", "test_own_rows"),
    ),
    **dict.fromkeys(
        ("evaluation/tasks", "evaluation/sources"),
        ("test_official", "test_bad_official", "test_bad_tasks", "test_hub_tasks", "test_submission"),
    ),
    "evaluation/submission.py": ("test_submission",),
}  # fmt: skip
"""Module or folder -> files of tests/evaluation that test it. The first entry that fits counts."""
PACKAGES = ("datasets", "pyarrow.parquet", "scipy.stats", "sklearn.metrics", "torch", "transformers")
"""Imported once, before the processes of the faults are forked."""
EQUIVALENTS = Path(__file__).with_name("equivalents.tsv")
"""Columns: module, fault, the line of the module, and why no result changes."""


@dataclass
class Faults:
    """A plugin of pytest. It runs the collected tests for every fault, and counts in ``tried``, ``survived``
    and ``equivalent``."""

    paths: Sequence[Path]
    deadline: float
    longest: float
    tried: int = 0
    survived: int = 0
    equivalent: int = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for path in self.paths:
            importlib.import_module(_module(path))
        with tempfile.NamedTemporaryFile("r+") as file:
            if _fails(600, lambda: self._measure(session, file.name)):
                sys.exit(f"{self.paths[0]}: its tests fail without a fault")
            seconds, lines = json.load(file)
        tests = sorted(session.items, key=lambda item: seconds[item.nodeid])
        tests = [test for test in tests if seconds[test.nodeid] <= self.longest]
        for path in self.paths:
            self._try_all(path, tests, lines)
        return True

    def _measure(self, session: pytest.Session, report: str) -> bool:
        """Runs every test without a fault; writes their seconds and the modules' lines that they run."""
        files = {str(path.resolve()): str(path) for path in self.paths}
        seconds: dict[str, float] = {}
        lines: dict[str, list[str]] = {}
        for test, after in zip(session.items, [*session.items[1:], None], strict=True):
            started = time.process_time()
            with _traced(files) as seen:
                failed = _failed([test], after)
            if failed:
                return True
            seconds[test.nodeid], lines[test.nodeid] = time.process_time() - started, sorted(seen)
        Path(report).write_text(json.dumps([seconds, lines]))
        return False

    def _try_all(self, path: Path, tests: list[pytest.Item], lines: dict[str, list[str]]) -> None:
        source, known = path.read_text(), set(equivalents(path))
        faults = list(mutants(source))
        random.Random(0).shuffle(faults)
        tried, found, equivalent = 0, 0, 0
        for fault in faults:
            if time.monotonic() > self.deadline:
                break
            tried += 1
            place = f"{path}:{fault.number}"
            chosen = [test for test in tests if place in lines[test.nodeid]] or tests

            def run(fault: Mutant = fault, chosen: list[pytest.Item] = chosen) -> bool:
                put(_module(path), fault.source)
                return _failed(chosen)

            if not _fails(60, run):
                found += 1
                equivalent += (same := fault.key in known)
                if not same:
                    print(f"{path}:{fault}", flush=True)
        print(f"{path}: {tried - found} of {tried} faults noticed, {equivalent} equivalent", flush=True)
        self.tried, self.survived = self.tried + tried, self.survived + found
        self.equivalent += equivalent


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def _fails(limit: int, run: Callable[[], bool]) -> bool:
    """Whether ``run`` in a child process says so, raises an error or takes longer than ``limit`` seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            signal.alarm(limit)
            code = run()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] != 0


def _failed(tests: Sequence[pytest.Item], after: pytest.Item | None = None) -> bool:
    """Runs tests until one fails; keeps what ``after`` needs of their fixtures."""
    for test, following in zip(tests, [*tests[1:], after], strict=True):
        test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
        if test.session.testsfailed:
            return True
    return False


@contextmanager
def _traced(files: dict[str, str]) -> Iterator[set[str]]:
    """Collects the lines that are run, as ``path:number``. files: absolute path -> path."""
    seen: set[str] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        seen.add(f"{files[frame.f_code.co_filename]}:{frame.f_lineno}")
        return trace

    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(None)


def equivalents(path: Path) -> Iterator[tuple[str, str]]:
    """(fault, line) of the faults of a module that change no result."""
    with EQUIVALENTS.open(newline="") as file:
        for module, fault, line, _ in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if module == str(path):
                yield fault, line


def _by_tests(given: Sequence[Path]) -> dict[tuple[str, ...], list[Path]]:
    """Test files -> the modules that they test."""
    found: dict[tuple[str, ...], list[Path]] = {}
    for one in given:
        for path in sorted(one.glob("*.py")) if one.is_dir() else [one]:
            names = next(names for start, names in TESTS.items() if str(path).startswith(start))
            found.setdefault(names, []).append(path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, help="modules or folders of TESTS")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    parser.add_argument(
        "--longest", type=float, default=1, help="leave out tests that compute for longer; default 1"
    )
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    for package in PACKAGES:
        importlib.import_module(package)
    tried = survived = equivalent = 0
    for names, paths in _by_tests(options.paths).items():
        faults = Faults(paths, deadline, options.longest)
        files = [f"tests/evaluation/{name}.py" for name in names]
        plain = ["-qq", "-s", "--disable-warnings", "-p", "no:cacheprovider"]
        pytest.main([*plain, "-o", "tmp_path_retention_policy=none", *files], plugins=[faults])
        tried, survived = tried + faults.tried, survived + faults.survived
        equivalent += faults.equivalent
    print(f"{tried - survived} of {tried} faults noticed: {(tried - survived) / max(1, tried):.1%}")
    changing = max(1, tried - equivalent)
    print(f"without {equivalent} that change no result: {(tried - survived) / changing:.1%}")


if __name__ == "__main__":
    main()
