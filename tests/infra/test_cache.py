"""What the cache takes for checked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.errors import WrongContent
from infra.files import storage
from infra.files.cache import Cache


def write_in_place(path: str) -> None:
    """Another byte in the same file, of the same size; a second later, as a slow clock shows it."""
    with open(path, "r+b") as file:
        file.write(b"X")
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def test_a_local_file_written_in_place_is_checked_again(tmp_path: Path) -> None:
    path, digest = str(tmp_path / "a.bin"), storage.digest_bytes(b"content")
    storage.publish_bytes(path, b"content")
    cache = Cache(None, 1 << 20)
    assert cache.local_path(path, digest) == path
    write_in_place(path)
    with pytest.raises(WrongContent, match="damaged content"):
        cache.local_path(path, digest)


def test_an_entry_is_checked_once_and_again_where_it_was_written_in_place(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest = storage.join(bucket, "a.bin"), storage.digest_bytes(b"content")
    storage.publish_bytes(path, b"content")
    Cache(str(tmp_path), 1 << 20).local_path(path, digest)
    checked: list[str] = []
    digest_file = storage.digest_file

    def counted(file: str) -> str:
        checked.append(file)
        return digest_file(file)

    monkeypatch.setattr(storage, "digest_file", counted)
    cache = Cache(str(tmp_path), 1 << 20)
    entry = cache.local_path(path, digest)
    assert cache.local_path(path, digest) == entry
    assert checked == [entry], "its use changed the time that tells whether it was written"
    write_in_place(entry)
    assert Path(cache.local_path(path, digest)).read_bytes() == b"content"
