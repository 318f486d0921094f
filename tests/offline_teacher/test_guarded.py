"""What a worker process makes of errors: whose fault they are, in words, with host and traceback."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from infra.errors import NodeError, UserError
from offline_teacher.cluster.guarded import ITEM, NODE, USER, Guarded, fault_of


@pytest.fixture(autouse=True)
def _tempdir_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker changes it for its process."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


class Fails(Guarded):
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
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), NODE),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), NODE),
        (ValueError("column hidden_states, sample 3: is NaN"), ITEM),
        (RuntimeError("shape '[2, 3]' is invalid"), ITEM),
    ],
)
def test_whose_fault_an_error_is(error: Exception, fault: str) -> None:
    assert fault_of(error) == fault
    answer = Fails(error).call("work", ())
    assert answer["error"] == fault
    assert answer["host"] == socket.gethostname()
    assert "in work" in answer["traceback"]


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
    class Works(Guarded):
        device = "cuda"

        def work(self, number: int) -> int:
            return number + 1

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    worker = Works()
    assert worker.call("work", (1,)) == {"result": 2, "host": socket.gethostname(), "device": "cuda:3"}
    worker.close()
