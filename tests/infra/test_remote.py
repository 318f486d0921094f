"""Object stores against a real S3 server process, with faults injected in between."""

from __future__ import annotations

import contextlib
import gzip
import subprocess
import sys
import tomllib
from pathlib import Path

import fsspec
import pytest

from infra.errors import UserError, WrongContent
from infra.files import paths, remote, storage
from infra.files.cache import Cache
from infra.redaction import without_secrets
from tests.conftest import ROOT
from tests.s3_server import FaultyProxy

DATA = bytes(range(256)) * 1000


def test_files_come_back_as_published(bucket: str, tmp_path: Path) -> None:
    path = storage.join(bucket, "run", "a.bin")
    assert not storage.exists(path)
    storage.publish_bytes(path, DATA)
    with storage.publishing(storage.join(bucket, "run", "b.bin")) as draft:
        Path(draft).write_bytes(DATA[::-1])
    storage.publish_json(storage.join(bucket, "run", "c.json"), {"b": 1, "a": [True]})
    assert storage.exists(path)
    assert storage.size(path) == len(DATA)
    assert storage.read_bytes(path) == DATA
    assert storage.read_bytes(storage.join(bucket, "run", "b.bin")) == DATA[::-1]
    assert storage.read_json(storage.join(bucket, "run", "c.json")) == {"a": [True], "b": 1}
    assert storage.digest_file(path) == storage.digest_bytes(DATA)
    assert storage.list_names(storage.join(bucket, "run")) == ["a.bin", "b.bin", "c.json"]
    assert storage.list_names(bucket) == ["run"]
    assert storage.list_sizes(storage.join(bucket, "run")) == {
        "a.bin": len(DATA),
        "b.bin": len(DATA),
        "c.json": storage.size(storage.join(bucket, "run", "c.json")),
    }
    assert storage.list_sizes(bucket) == storage.list_sizes(storage.join(bucket, "absent")) == {}
    assert paths.find_files([storage.join(bucket, "run", "*.bin")]) == [
        storage.join(bucket, "run", "a.bin"),
        storage.join(bucket, "run", "b.bin"),
    ]
    storage.remove(path)
    storage.remove(path)
    assert storage.list_names(storage.join(bucket, "run")) == ["b.bin", "c.json"]
    storage.remove_tree(storage.join(bucket, "run"))
    storage.remove_tree(storage.join(bucket, "run"))
    assert storage.list_names(storage.join(bucket, "run")) == []


def test_a_remote_path_is_first_tried_as_it_is_written(bucket: str) -> None:
    names = ["novels [1847-1911]/a.txt", "novels [1847-1911]/b[1].txt", "novels 1/c.txt", "what?.txt"]
    urls = [f"{bucket}/{name}" for name in names]
    for url in urls:
        storage.publish_bytes(url, b"x")
    assert paths.find_files([f"{bucket}/novels [1847-1911]/*.txt"]) == urls[:2]
    assert paths.find_files(urls[1:2]) == urls[1:2]
    assert paths.find_files([urls[3]]) == [urls[3]]
    assert paths.find_files([f"{bucket}/novels [0-9]/*.txt"]) == [urls[2]]
    with pytest.raises(UserError, match=r"novels \[1847-1911\]: is a directory; name its files, for example"):
        paths.find_files([f"{bucket}/novels [1847-1911]"])
    storage.remove_tree(f"{bucket}/novels [1847-1911]")
    assert storage.list_names(bucket) == ["novels 1", "what?.txt"]


def test_nothing_is_published_when_the_writer_fails(bucket: str) -> None:
    path = storage.join(bucket, "a.bin")
    with pytest.raises(RuntimeError), storage.publishing(path) as draft:
        Path(draft).write_bytes(b"half")
        raise RuntimeError
    assert not storage.exists(path)


def test_streams_read_in_ranges_and_decompress(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHUNK", 10_000)
    storage.publish_bytes(storage.join(bucket, "a.bin"), DATA)
    storage.publish_bytes(storage.join(bucket, "a.txt.gz"), gzip.compress(b"one\ntwo\n" * 9999))
    with storage.open_binary(storage.join(bucket, "a.bin")) as stream:
        assert stream.read(5) == DATA[:5]
        stream.seek(100_001)
        assert stream.read() == DATA[100_001:]
    with storage.open_binary(storage.join(bucket, "a.txt.gz")) as stream:
        assert sum(line == b"two\n" for line in stream) == 9999


@pytest.mark.parametrize(
    ("fault", "method"),
    [
        *((fault, method) for fault in ("500", "503", "reset", "cut") for method in ("GET", "PUT", "HEAD")),
        ("torn", "PUT"),
    ],
)
def test_a_passing_fault_is_not_noticed(bucket: str, proxy: FaultyProxy, fault: str, method: str) -> None:
    path = storage.join(bucket, "a.bin")
    proxy.once(fault, fault, method=method)
    storage.publish_bytes(path, DATA)
    assert storage.size(path) == len(DATA)
    assert storage.read_bytes(path) == DATA
    assert storage.digest_file(path) == storage.digest_bytes(DATA)
    assert [seen for seen in proxy.seen if seen[2] == fault], "the fault was not met"


def test_files_and_listings_are_downloaded_once(bucket: str, proxy: FaultyProxy) -> None:
    path = storage.join(bucket, "a.txt")
    storage.publish_bytes(path, DATA)
    for read, expected in [
        (lambda: storage.read_bytes(path), DATA),
        (lambda: storage.digest_file(path), storage.digest_bytes(DATA)),
        (lambda: storage.read_range(path, 3, 10), DATA[3:10]),
        (lambda: storage.open_binary(path).read(len(DATA)), DATA),
        (lambda: storage.list_names(bucket), ["a.txt"]),
        (lambda: storage.list_sizes(bucket), {"a.txt": len(DATA)}),
    ]:
        proxy.seen.clear()
        assert read() == expected
        assert [method for method, _, _ in proxy.seen].count("GET") == 1


def test_directories_and_pages_are_listed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAGE_NAMES", 2)
    for name in ("x/a.txt", "x/b/c.txt", "x/b/d.txt", "x/e.txt", "xy.txt"):
        storage.publish_bytes(f"{bucket}/{name}", b"12")
    assert storage.list_names(f"{bucket}/x") == ["a.txt", "b", "e.txt"]
    assert storage.list_sizes(f"{bucket}/x/") == {"a.txt": 2, "e.txt": 2}
    assert storage.list_names(bucket) == ["x", "xy.txt"]
    for absent in (f"{bucket}/none", f"{bucket}/x/a.txt", "s3://no-such-bucket/x"):
        assert storage.list_names(absent) == []


def test_only_the_first_is_published(bucket: str, proxy: FaultyProxy) -> None:
    path = storage.join(bucket, "a.json")
    assert storage.publish_if_absent(path, b"first")
    assert not storage.publish_if_absent(path, b"second")
    assert storage.read_bytes(path) == b"first"
    other = storage.join(bucket, "b.json")
    proxy.once("503", "reset", method="PUT")
    assert storage.publish_if_absent(other, b"first"), "a passing fault is no other writer"


def test_small_files_are_one_request(bucket: str, proxy: FaultyProxy) -> None:
    path = storage.join(bucket, "a.bin")
    assert storage.read_small(path, 10) is None
    for data in (b"", b"0123456789"):
        storage.publish_bytes(path, data)
        proxy.seen.clear()
        assert storage.read_small(path, 10) == data
        assert [method for method, _, _ in proxy.seen] == ["GET"]
    with pytest.raises(ValueError, match="larger than 9 bytes"):
        storage.read_small(path, 9)


def test_a_range_behind_the_end_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    path = storage.join(bucket, "a.bin")
    storage.publish_bytes(path, b"0123456789")
    assert storage.read_range(path, 2, 10) == b"23456789"
    for start, stop in ((5, 11), (10, 12)):
        with pytest.raises(UserError, match=f"^{bucket}/a.bin: "):
            storage.read_range(path, start, stop)


def test_parts_of_files_are_kept_and_the_oldest_go(tmp_path: Path) -> None:
    cache, fetched = Cache(str(tmp_path), 3000), []

    def part(number: int) -> bytes:
        def fetch() -> bytes:
            fetched.append(number)
            return bytes([number]) * 1000

        found = bytes(cache.get_or_fetch(f"{number}-0-1000", fetch))
        assert found == bytes([number]) * 1000
        return found

    for number in (0, 1, 2, 0, 3, 0, 1):
        part(number)
    assert fetched == [0, 1, 2, 3, 1]
    cache.drop("0-0-1000")
    cache.drop("0-0-1000")
    part(0)
    assert fetched[-1] == 0
    with pytest.raises(UserError, match="nothing there"):
        cache.get_or_fetch("9", absent)
    assert len(list(tmp_path.glob("xxh3-128-*"))) == 3


def absent() -> bytes:
    raise UserError("nothing there")


def test_what_can_be_checked_is_downloaded_again_only_when_wrong(bucket: str, proxy: FaultyProxy) -> None:
    path, data = storage.join(bucket, "a.json"), b'{"a": 1}'
    storage.publish_bytes(path, data)

    def right(found: bytes) -> bytes:
        if found != data:
            raise ValueError("wrong")
        return found

    for wrong, downloads in (0, 1), (1, 2), (2, 3), (3, 3):
        proxy.seen.clear()
        proxy.once(*["wrong"] * wrong)
        with pytest.raises(ValueError, match="wrong") if wrong == 3 else contextlib.nullcontext():
            assert storage.read_checked(path, 100, right) == data
        assert [method for method, _, _ in proxy.seen].count("GET") == downloads
    proxy.once("wrong")
    assert storage.read_small(path, 100) != data


def test_a_hanging_call_is_given_up_and_repeated(
    bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = storage.join(bucket, "a.bin")
    storage.publish_bytes(path, DATA)
    monkeypatch.setattr(remote, "CALL_SECONDS", 0.5)
    proxy.once("hang")
    assert storage.read_bytes(path) == DATA
    assert [fault for _, _, fault in proxy.seen].count("hang") == 1


def test_a_lasting_fault_is_one_clear_line(
    bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    path = storage.join(bucket, "a.bin")
    proxy.choose = lambda method, path: "reset" if method == "PUT" else None
    with pytest.raises(UserError, match=rf"^{bucket}/a.bin: \w+: .* \(2 attempts\)$"):
        storage.publish_bytes(path, DATA)
    proxy.choose = lambda method, path: None
    assert not storage.exists(path)
    with pytest.raises(UserError, match=f"^{bucket}/a.bin: no such file$"):
        storage.read_bytes(path)
    with pytest.raises(UserError, match=r"matches no file$"):
        paths.find_files([storage.join(bucket, "*.txt")])


def test_a_wrong_download_is_repeated_then_refused(bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    path, digest = storage.join(bucket, "a.bin"), storage.digest_bytes(DATA)
    storage.publish_bytes(path, DATA)
    proxy.once("wrong", "wrong")
    cache = Cache(str(tmp_path), 1 << 30)
    local = cache.local_path(path, digest)
    assert Path(local).read_bytes() == DATA
    proxy.once(*["wrong"] * 3)
    with pytest.raises(WrongContent, match=f"^{bucket}/a.bin: damaged content"):
        Cache(str(tmp_path / "other"), 1 << 30).local_path(path, digest)
    assert [name for name in storage.list_names(str(tmp_path / "other")) if name[0] != "."] == []
    proxy.seen.clear()
    assert Cache(str(tmp_path), 1 << 30).local_path(path, digest) == local
    assert proxy.seen == [], "a cached file was fetched again"


def test_a_damaged_cache_entry_is_fetched_again(bucket: str, tmp_path: Path) -> None:
    path, digest = storage.join(bucket, "a.bin"), storage.digest_bytes(DATA)
    storage.publish_bytes(path, DATA)
    local = Cache(str(tmp_path), 1 << 30).local_path(path, digest)
    Path(local).write_bytes(DATA[:-1] + b"x")
    assert Path(Cache(str(tmp_path), 1 << 30).local_path(path, digest)).read_bytes() == DATA


def test_the_least_recently_used_goes_first(bucket: str, tmp_path: Path) -> None:
    contents = [bytes([number]) * 1000 for number in range(4)]
    digests = [storage.digest_bytes(content) for content in contents]
    paths = [storage.join(bucket, f"{number}.bin") for number in range(4)]
    for path, content in zip(paths, contents, strict=True):
        storage.publish_bytes(path, content)
    cache = Cache(str(tmp_path), 3000)
    for number in (0, 1, 2, 0, 3):
        cache.local_path(paths[number], digests[number])
    kept = {path.read_bytes() for path in tmp_path.glob("xxh3-128-*")}
    assert kept == {contents[0], contents[2], contents[3]}


READER = """
import sys
from infra.files import paths, storage
from infra.files.cache import Cache
directory, bucket, seed = sys.argv[1:]
import random
order = random.Random(int(seed)).choices(range(6), k=25)
cache = Cache(directory, 2500)
for number in order:
    content = bytes([number]) * 1000
    path = cache.local_path(storage.join(bucket, f"{number}.bin"), storage.digest_bytes(content))
    assert open(path, "rb").read() == content
"""


def test_processes_share_a_cache_smaller_than_their_needs(bucket: str, tmp_path: Path) -> None:
    for number in range(6):
        storage.publish_bytes(storage.join(bucket, f"{number}.bin"), bytes([number]) * 1000)
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(tmp_path), bucket, str(seed)])
        for seed in range(3)
    ]
    assert [reader.wait() for reader in readers] == [0, 0, 0]
    assert sum(path.stat().st_size for path in tmp_path.glob("xxh3-128-*")) <= 2500


def test_an_upload_whose_last_answer_was_lost_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completing it again finds no such upload: what s3fs makes of that is no absent file."""
    from botocore.exceptions import ClientError

    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)

    def error(code: str) -> FileNotFoundError:
        problem = FileNotFoundError("no such")
        problem.__cause__ = ClientError({"Error": {"Code": code}}, "CompleteMultipartUpload")
        return problem

    answers = [error("NoSuchUpload"), error("NoSuchUpload"), "uploaded"]

    def upload() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert remote.with_retries(upload, "s3://bucket/x") == "uploaded"
    answers[:] = [error("NoSuchKey"), "uploaded"]
    with pytest.raises(FileNotFoundError):
        remote.with_retries(upload, "s3://bucket/x")


def test_an_unknown_url_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^ftp://host/x: unknown kind of URL; known are s3://"):
        storage.read_bytes("ftp://user:secret@host/x?token=1")


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("s3://bucket/x", "s3fs"),
        ("gs://bucket/x", "gcsfs"),
        ("abfs://box@account.dfs.core.windows.net/x", "adlfs"),
        ("abfss://box/x", "adlfs"),
        ("az://box/x", "adlfs"),
    ],
)
def test_a_missing_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    remote._filesystem.cache_clear()
    scheme = url.partition(":")[0]
    extra = remote.EXTRAS[package]
    told = f"^{scheme}:// needs the package {package}, .*'offline-encoder-distillation\\[{extra}\\]'$"
    with pytest.raises(UserError, match=told):
        storage.read_bytes(url)


def test_the_extra_that_is_named_installs_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(remote.EXTRAS) == set(remote.PACKAGES.values())
    for package, extra in remote.EXTRAS.items():
        assert any(line.startswith(f"{package}>=") for line in extras[extra])


def test_the_account_of_a_url_reaches_azure_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, object] = {}

    class Azure(fsspec.asyn.AsyncFileSystem):
        def __init__(self, **options: object) -> None:
            made.update(options)
            super().__init__(**options)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            container, _, key = path.partition("://")[2].partition("/")
            return f"{container.partition('@')[0]}/{key}"

        async def _info(self, path: str) -> dict[str, object]:
            raise FileNotFoundError(path)

        async def _glob(self, pattern: str, detail: bool) -> dict[str, dict[str, str]]:
            return {pattern.replace("*", name): {"type": "file"} for name in ("a", "b")}

    remote._filesystem.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: Azure(**options))
    home = "abfs://box@account.dfs.core.windows.net"
    assert paths.find_files([f"{home}/run/*.txt"]) == [f"{home}/run/a.txt", f"{home}/run/b.txt"]
    assert made["account_name"] == "account"
    remote._filesystem.cache_clear()


def test_secrets_of_a_url_are_not_shown() -> None:
    assert without_secrets("s3://key:secret@bucket/a?X-Amz-Signature=b") == "s3://bucket/a"
    assert without_secrets("abfs://data@account.dfs.core.windows.net/a?sig=b") == (
        "abfs://data@account.dfs.core.windows.net/a"
    )
    assert without_secrets("a/b?c") == "a/b?c"
