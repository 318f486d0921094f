"""Local files: whole or not at all, and one clear line when it cannot be done."""

from __future__ import annotations

import errno
import gzip
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import DamagedFile, UserError, WrongContent
from infra.files import paths, storage
from infra.files.cache import Cache


def test_published_bytes_are_there_with_ordinary_rights(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.bin"
    storage.publish_bytes(str(path), b"one")
    storage.publish_bytes(str(path), b"two")
    assert path.read_bytes() == b"two"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert os.listdir(path.parent) == ["a.bin"]


def test_a_draft_is_private_keeps_its_extension_and_is_not_listed(tmp_path: Path) -> None:
    with storage.publishing(str(tmp_path / "plot.png")) as draft:
        assert stat.S_IMODE(os.stat(draft).st_mode) == 0o600
        assert draft.endswith(".png")
        assert os.path.dirname(draft) == str(tmp_path)
        assert storage.list_names(str(tmp_path)) == []
    assert storage.list_names(str(tmp_path)) == ["plot.png"]


def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    storage.publish_bytes(path, b"old")
    with pytest.raises(RuntimeError), storage.publishing(path) as draft:
        Path(draft).write_bytes(b"ne")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["a.bin"]
    assert Path(path).read_bytes() == b"old"


def test_it_is_synced_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        events.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def seen_replace(source: str, target: str) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    storage.publish_bytes(str(tmp_path / "a"), b"x")
    assert events == ["file", "rename", "directory"]


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / f"{storage.UNFINISHED}0123-a.bin").write_bytes(b"half")
    (tmp_path / "sub" / "a.bin").write_bytes(b"whole")
    storage.remove_unfinished(str(tmp_path))
    assert os.listdir(tmp_path / "sub") == ["a.bin"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
    ],
)
@pytest.mark.parametrize("where", ["fsync", "open", "replace"])
def test_a_disk_that_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, where: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a.bin"
    with monkeypatch.context() as patch:
        patch.setattr(os, where, refuse)
        with pytest.raises(UserError, match=f"^{path}: .*{words}"):
            storage.publish_bytes(str(path), b"x")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_while_the_caller_writes_is_one_line_too(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    with pytest.raises(UserError, match="the disk is full"), storage.publishing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="other"), storage.publishing(path):
        (tmp_path / "other").read_bytes()


def test_wrong_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    missing = str(tmp_path / "missing")
    for action, words in [
        (lambda: storage.read_bytes(missing), "missing: no such file"),
        (lambda: storage.size(missing), "missing: no such file"),
        (lambda: storage.open_binary(missing), "missing: no such file"),
        (lambda: storage.digest_file(missing), "missing: no such file"),
        (lambda: storage.read_bytes(str(tmp_path)), "is a directory"),
        (lambda: storage.publish_bytes(str(tmp_path / "file" / "a"), b"x"), "file"),
        (lambda: storage.read_json(str(tmp_path / "file")), "file: is not JSON"),
        (
            lambda: paths.find_files([str(tmp_path)]),
            r"is a directory; name its files, for example .*/\*\.txt",
        ),
        (lambda: paths.find_files([str(tmp_path / "*.txt")]), r"\*\.txt: matches no file"),
    ]:
        with pytest.raises(UserError, match=words):
            action()
    assert storage.list_names(missing) == []
    assert not storage.exists(missing)
    storage.remove(missing)
    storage.remove_tree(missing)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[" * 100_000, b'{"a": 1'])
def test_what_is_not_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: is not JSON"):
        storage.read_json(str(tmp_path / "a.json"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(value=json_values)
def test_json_comes_back_and_is_canonical(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = str(tmp_path_factory.getbasetemp() / "value.json")
    storage.publish_json(path, value)
    first = storage.read_bytes(path)
    assert storage.read_json(path) == value
    storage.publish_json(path, json.loads(first))
    assert storage.read_bytes(path) == first


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.publish_json(str(tmp_path / "a.json"), {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_join() -> None:
    assert storage.join("runs", "demo", "store") == "runs/demo/store"
    assert storage.join("runs/", "tokenizer/vocab.txt") == "runs/tokenizer/vocab.txt"
    assert storage.join("/", "a") == "/a"
    assert storage.join("", "a") == "a"
    assert storage.join("s3://bucket/", "a") == "s3://bucket/a"


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../a", "a/../b", "/etc/passwd", "a//b", "a\\b", "a\0", "a\n", "a/"]
)
def test_join_refuses_names_that_escape(name: str) -> None:
    with pytest.raises(UserError, match="is not the name of a file inside it"):
        storage.join("root", name)


@given(name=st.text(max_size=20))
def test_join_stays_inside(name: str) -> None:
    try:
        joined = storage.join("/base/root", name)
    except UserError:
        return
    assert os.path.normpath(joined) == joined
    assert joined.startswith("/base/root/")


@given(data=st.binary(max_size=1000))
def test_digests_agree(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "digest.bin"
    path.write_bytes(data)
    assert storage.digest_file(str(path)) == storage.digest_bytes(data)


def test_the_digest_is_xxh3() -> None:
    # The value of the empty input in xxHash's own sanity test vectors.
    assert storage.digest_bytes(b"") == "xxh3-128:99aa06d3014798d86001c324468d497f"


def test_expand_sorts_and_counts_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "[odd].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    inside = [str(tmp_path / name) for name in ("[odd].txt", "a.txt", "b.txt")]
    assert paths.find_files([str(tmp_path / "*.txt"), inside[1]]) == inside
    assert paths.find_files([inside[0]]) == [inside[0]]
    assert len(paths.find_files([str(tmp_path / "**" / "*.txt")])) == 4


def test_a_path_is_first_tried_as_it_is_written(tmp_path: Path) -> None:
    for name in ("novels [1847-1911]/a.txt", "novels [1847-1911]/b/c[2].txt", "novels 1/d.txt", "e*/f?.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for glob, names in {
        "novels [1847-1911]/*.txt": ["novels [1847-1911]/a.txt"],
        "novels [1847-1911]/**/*.txt": ["novels [1847-1911]/a.txt", "novels [1847-1911]/b/c[2].txt"],
        "novels [1847-1911]/b/c[2].txt": ["novels [1847-1911]/b/c[2].txt"],
        "novels [0-9]/*": ["novels 1/d.txt"],
        "e*/f?.txt": ["e*/f?.txt"],
        "e*/*": ["e*/f?.txt"],
    }.items():
        found = [os.path.relpath(path, tmp_path) for path in paths.find_files([str(tmp_path / glob)])]
        assert found == names, glob
    with pytest.raises(
        UserError, match=r"\[1847-1911\]/: is a directory; name its files, for example (.*)"
    ) as no:
        paths.find_files([f"{tmp_path}/novels [1847-1911]/"])
    advice = str(no.value).rpartition("for example ")[2]
    assert len(paths.find_files([advice])) == 1


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("~", "HOME"),
        ("~/x", "HOME/x"),
        ("file://~/x", "HOME/x"),
        ("file:///data/x", "/data/x"),
        ("a~/x", "a~/x"),
        ("s3://bucket/~/x", "s3://bucket/~/x"),
        ("s3://~/x", "s3://~/x"),
        ("bert-base-uncased", "bert-base-uncased"),
    ],
)
def test_what_a_path_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, meant: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.expand_home(path) == meant.replace("HOME", str(tmp_path))


def compressed(kind: str, data: bytes) -> bytes:
    if kind == "gz":
        return gzip.compress(data)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_files_read_as_what_they_hold(tmp_path: Path, kind: str) -> None:
    path, data = tmp_path / f"a.txt.{kind}", "zwei\nWörter\n".encode() * 50_000
    path.write_bytes(compressed(kind, data) * 2)  # two members, as `cat` makes them
    with storage.open_binary(str(path)) as stream:
        assert stream.read() == data * 2
    with storage.open_binary(str(path)) as stream:
        assert next(iter(stream)) == b"zwei\n"


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_cut_short_is_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.txt.{kind}"
    path.write_bytes(compressed(kind, os.urandom(100_000))[:-100])
    with (
        storage.open_binary(str(path)) as stream,
        pytest.raises(DamagedFile, match=f"^{path}: damaged"),
    ):
        stream.read()


def test_the_cache_checks_local_files_where_they_are(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    storage.publish_bytes(path, b"content")
    cache = Cache(None, 1 << 20)
    assert cache.local_path(path, storage.digest_bytes(b"content")) == path
    with pytest.raises(WrongContent, match="damaged content"):
        Cache(None, 1 << 20).local_path(path, storage.digest_bytes(b"other"))
    storage.publish_bytes(path, b"another")
    with pytest.raises(WrongContent):
        cache.local_path(path, storage.digest_bytes(b"content"))


def test_sizes_are_of_files_alone(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / f"{storage.UNFINISHED}b").write_bytes(b"1")
    (tmp_path / "nowhere").symlink_to("absent")
    assert storage.list_sizes(str(tmp_path)) == {"a": 2}
    assert storage.list_sizes(str(tmp_path / "absent")) == {}


def test_only_the_first_is_published(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "a.json")
    assert storage.publish_if_absent(path, b"first")
    assert not storage.publish_if_absent(path, b"second")
    assert Path(path).read_bytes() == b"first"
    assert os.listdir(tmp_path / "new") == ["a.json"]


def test_of_many_at_once_one_is_the_first(tmp_path: Path) -> None:
    path, together = str(tmp_path / "a.json"), threading.Barrier(8)

    def publish(number: int) -> bool:
        together.wait(60)
        return storage.publish_if_absent(path, bytes([number]) * 100)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(publish, range(8)))
    assert sum(won) == 1
    assert Path(path).read_bytes() == bytes([won.index(True)]) * 100
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_system_without_hard_links_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(UserError, match=r"a.json: its file system has no hard links .*choose another"):
        storage.publish_if_absent(str(tmp_path / "a.json"), b"x")
    assert os.listdir(tmp_path) == []


def test_small_files(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    assert storage.read_small(path, 10) is None
    for data in (b"", b"0123456789"):
        storage.publish_bytes(path, data)
        assert storage.read_small(path, 10) == data
    with pytest.raises(ValueError, match="larger than 9 bytes"):
        storage.read_small(path, 9)


def test_ranges_of_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    storage.publish_bytes(path, b"0123456789")
    assert storage.read_range(path, 2, 5) == b"234"
    assert storage.read_range(path, 0, 10) == b"0123456789"
    with pytest.raises(UserError, match=r"a\.bin: ends before byte 11$"):
        storage.read_range(path, 5, 11)
    with pytest.raises(UserError, match=r"b\.bin: no such file$"):
        storage.read_range(f"{tmp_path}/b.bin", 0, 1)


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    contents = [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=storage.publish_bytes, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Path(path).read_bytes() in contents
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"[1]"])
def test_an_object_that_may_be_missing_or_damaged(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    assert storage.read_object(str(path)) == {}
    path.write_text('{"a": 1}')
    assert storage.read_object(str(path)) == {"a": 1}


def test_an_object_that_cannot_be_read_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    """Otherwise a failing disk or object store would make a command write over what it could not read."""
    with pytest.raises(UserError):
        storage.read_object(str(tmp_path))
