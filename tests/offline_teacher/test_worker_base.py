"""What a worker process makes of errors: whose fault they are, in words, with host and traceback."""

from __future__ import annotations

import errno
import socket
import tempfile
from pathlib import Path

import pytest

from infra.errors import EXIT_INCOMPLETE, NodeError, UserError
from infra.settings.sections import Corpus, Sequences
from offline_teacher.cluster.crews import TextWorker
from offline_teacher.cluster.worker_base import (
    ITEM,
    LONGEST_REASON,
    LONGEST_TRACEBACK,
    NODE,
    USER,
    WorkerBase,
    cause_of,
)
from tests.offline_teacher.test_sequences import how


@pytest.fixture(autouse=True)
def _tempdir_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker changes it for its process."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


class Fails(WorkerBase):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def work(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (UserError("text.txt, line 3: invalid UTF-8"), USER),
        (NodeError("s3://b/x: 503"), NODE),
        (OSError(errno.ENOSPC, "No space left on device"), NODE),
        (MemoryError(), NODE),
        (OutOfMemoryError("HIP out of memory. Tried to allocate 20 GiB"), NODE),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), NODE),
        (ValueError("column hidden_states, sample 3: is NaN"), ITEM),
        (RuntimeError("shape '[2, 3]' is invalid"), ITEM),
    ],
)
def test_whose_fault_an_error_is(error: Exception, fault: str) -> None:
    assert cause_of(error) == fault
    answer = Fails(error).call("work", ())
    assert answer["error"] == fault
    assert answer["host"] == socket.gethostname()
    assert "in work" in answer["traceback"]


def test_a_node_without_the_store_gets_no_part_of_the_text(tmp_path: Path) -> None:
    root = str(tmp_path / "unmounted")
    worker = TextWorker(how(root, Corpus(path=("x",)), Sequences(length=8)))
    assert worker.call("prepare", ())["error"] == NODE


def test_an_error_is_one_short_line_with_the_end_of_its_traceback() -> None:
    answer = Fails(ValueError("a\nb " + "long " * 10_000)).call("work", ())
    assert answer["reason"].startswith("ValueError: a b long long")
    assert len(answer["reason"]) <= len("ValueError: ") + LONGEST_REASON
    assert len(answer["traceback"]) == LONGEST_TRACEBACK
    assert answer["traceback"].endswith("long \n")


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("x"), 2), (UserError("x", EXIT_INCOMPLETE), EXIT_INCOMPLETE), (KeyError(), None)],
)
def test_a_users_mistake_keeps_its_exit_code(error: Exception, code: int | None) -> None:
    assert Fails(error).call("work", ())["exit_code"] == code


def test_temporary_files_are_in_one_directory_that_goes_with_the_worker() -> None:
    class Writes(WorkerBase):
        def work(self) -> str:
            return tempfile.mkdtemp()

    worker = Writes()
    made = [Path(worker.call("work", ())["result"]) for _ in range(2)]
    assert made[0].parent == made[1].parent
    assert made[0].is_dir()
    worker.close()
    assert not made[0].parent.exists()


def test_a_full_disk_is_said_in_words_that_name_the_file() -> None:
    answer = Fails(OSError(errno.ENOSPC, "No space left on device", "/scratch/part")).call("work", ())
    assert answer["reason"].startswith("/scratch/part: the disk is full")


def test_a_worker_without_room_for_temporary_files_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not die of it, since then nobody would know of what."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    answer = Fails(ValueError("x")).call("work", ())
    assert (answer["error"], answer["exit_code"]) == (NODE, 2)
    assert "TMPDIR" in answer["reason"]


def test_an_answer_says_where_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Works(WorkerBase):
        device = "cuda"

        def work(self, number: int) -> int:
            return number + 1

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    worker = Works()
    assert worker.call("work", (1,)) == {"result": 2, "host": socket.gethostname(), "device": "cuda:3"}
    worker.close()
