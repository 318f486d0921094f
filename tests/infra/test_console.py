"""Exit codes, progress lines and tables, seen from outside."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from infra import console


def run(body: str) -> subprocess.CompletedProcess[str]:
    program = (
        # A shell starts background jobs with Ctrl-C ignored, which their children inherit.
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from infra.console import command\nfrom infra.errors import UserError\n{body}\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_a_users_mistake_is_one_line_and_exit_2() -> None:
    done = run("def main(): raise UserError('corpus.path: matches\\n no file')\ncommand(main)")
    assert (done.returncode, done.stderr) == (2, "error: corpus.path: matches no file\n")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("command(lambda: None)", 0),
        ("command(lambda: 3)", 3),
        ("def main(): raise UserError('x', exit_code=3)\ncommand(main)", 3),
    ],
)
def test_exit_codes(body: str, code: int) -> None:
    assert run(body).returncode == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_order(number: signal.Signals, code: int) -> None:
    done = run(
        "def main():\n try:\n"
        f"  os.kill(os.getpid(), {int(number)}); signal.pause()\n"
        " finally: print('closed')\ncommand(main)"
    )
    assert done.returncode == code
    assert done.stdout == "closed\n"
    assert done.stderr == "interrupted; the same command continues where it stopped\n"


def test_sigterm_within_a_call_that_raises_anew_keeps_its_code() -> None:
    """As Ray does where a handler raises while it waits."""
    done = run(
        f"def main():\n try: os.kill(os.getpid(), {int(signal.SIGTERM)}); signal.pause()\n"
        " except BaseException: raise KeyboardInterrupt from None\ncommand(main)"
    )
    assert done.returncode == 143


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = run("def main(): print('stor\u0119 done')\ncommand(main)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "stor\\u0119 done\n", "")


def test_our_own_mistakes_show_a_traceback() -> None:
    done = run("def main(): assert False, 'broken'\ncommand(main)")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_progress_prints_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.progress(100, "shards", "teacher", done=20) as shown:
        for seconds in (4, 4, 4):  # the third is past ten seconds
            clock[0] += seconds
            shown.advance(2)
        shown.note("loss 3.2")
        clock[0] += 148
        shown.advance(74)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "teacher: 26/100 shards, 0.5 shards/s, 2m28s left",
        "teacher: 100/100 shards, 0.5 shards/s, loss 3.2",  # once: nothing has changed when it closes
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_said_is_shown_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with console.progress(100, "shards", "teacher") as shown:
        capsys.readouterr()
        shown.say("waiting for 2 workers")
        assert "teacher: waiting for 2 workers\n" in capsys.readouterr().err


def test_durations() -> None:
    assert [console.duration(seconds) for seconds in (0.4, 59, 75.2, 3599.7, 4000)] == [
        "0s",
        "59s",
        "1m15s",
        "1h00m",
        "1h06m",
    ]


def test_tables_show_values_as_given() -> None:
    assert console.table([["SST-2", "0.910"], ["CoLA", 1]], ["task", "score"]).splitlines() == [
        "task    score",
        "------  -------",
        "SST-2   0.910",
        "CoLA    1",
    ]


def test_sigterm_while_ray_starts_is_handled_as_ever() -> None:
    """Ray puts a handler of its own in place, which exits."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        own = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit), console.keeping_sigterm_handler():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
