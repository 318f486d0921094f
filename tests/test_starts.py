"""What needs no work loads no heavy package: ``--help`` and mistakes, of every command.

Of commands whose work is done already, see ``test_end_to_end.py``. Times are measured, not asserted, in
``tests/benchmarks/bench_starts.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.starts import COMMANDS, HEAVY, loaded, mistakes, start


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command: str) -> None:
    ended = start([*COMMANDS[command], "--help"])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("usage: ")
    assert not loaded(ended) & HEAVY


@pytest.mark.parametrize("command", mistakes(Path()))
def test_a_mistake_loads_nothing_heavy(command: str, tmp_path: Path) -> None:
    ended = start(mistakes(tmp_path)[command])
    assert ended.returncode == 2, ended.stderr
    assert "error: " in ended.stderr
    assert not loaded(ended) & HEAVY
    assert list(tmp_path.rglob("*")) == []


def test_what_is_loaded_is_seen() -> None:
    assert {"json", "tabulate"} <= loaded(start(["-c", "import json, tabulate"]))
