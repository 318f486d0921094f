"""A stage's own progress reaches the person; all else it says is in its log, which is named when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra.demo.stage import run_stage
from infra.errors import UserError
from tests.conftest import ROOT

STAGE = """
import sys
from infra.console import progress
print("a library's notice")
print("its warning", file=sys.stderr)
with progress(3, "steps", "student", 1) as shown:
    shown.say("a word")
    shown.note("loss 2.5")
    shown.advance(2)
"""


def stage(script: str, log: Path) -> None:
    run_stage([sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(ROOT)}, log)


def test_progress_is_shown_and_the_rest_is_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stage(STAGE, tmp_path / "logs" / "student.log")
    shown = capfd.readouterr()
    first, last = shown.err.splitlines()
    assert first == "student: a word"
    assert last.startswith("student: 3/3 steps, ")
    assert last.endswith("loss 2.5")
    assert shown.out == ""
    log = (tmp_path / "logs" / "student.log").read_text()
    assert {"a library's notice", "its warning"} <= set(log.splitlines())


def test_a_failure_names_the_log_and_shows_its_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "student.log"
    with pytest.raises(UserError, match=f"exit code 2.*{log}.*same command"):
        stage("import sys; [print(n) for n in range(50)]; print('error: no'); sys.exit(2)", log)
    shown = capfd.readouterr().err.splitlines()
    assert shown[-2:] == ["| 49", "| error: no"]
    assert len(shown) < 10


def test_ctrl_c_is_one_line_and_the_stage_has_ended_before_the_demo(tmp_path: Path) -> None:
    """Both hear it, as from a terminal; the stage takes its time to save."""
    saving = (
        "import signal, pathlib, sys\n"
        "from infra.console import progress\n"
        "with progress(9, 'steps', 'student') as shown:\n"
        "    shown.say('at work')\n"
        "    try:\n"
        "        signal.pause()\n"
        "    except KeyboardInterrupt:\n"
        "        pathlib.Path(sys.argv[1]).touch()\n"
        "        sys.exit(130)\n"
    )
    demo = (
        "import os, sys, pathlib\n"
        "from infra.console import command\n"
        "from infra.demo.stage import run_stage\n"
        "words = [sys.executable, '-c', sys.argv[1], 'saved']\n"
        "command(lambda: run_stage(words, dict(os.environ), pathlib.Path('s.log')))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", demo, saving], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "student: at work\n"
    os.killpg(process.pid, signal.SIGINT)
    said = process.stderr.read().splitlines()
    assert process.wait() == 130
    assert (tmp_path / "saved").exists()
    assert said[-1] == "interrupted; the same command continues where it stopped"
    assert all(line.startswith("student: 0/9") for line in said[:-1])
