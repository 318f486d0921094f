"""A student whose output is on an object store: training writes a local directory, which is copied there.

    with mirrored("s3://bucket/runs/name/student", cache_dir) as mirror:   # None for a local output
        ... work in mirror.local ...
        mirror.push()                                                      # after every checkpoint

The remote ``files.json`` is written after the files that it lists. Files that it does not list are left over
from an interrupted push.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from infra.errors import UserError, WrongContent
from infra.files import storage
from infra.files.locks import exclusive, locked

INDEX = "files.json"
_OWN = (storage.UNFINISHED, storage.LOCK, ".pull")
"""Prefixes of file names that are not copied."""


class Mirror:
    """``remote`` and the private local directory that stands for it."""

    def __init__(self, remote: str, local: str) -> None:
        self.remote, self.local = remote, local
        self._known: dict[str, tuple[int, int, str]] = {}
        """Name -> size, time and digest of a local file when it was last pushed or pulled."""

    def pull(self) -> None:
        """Fetches what the remote index lists and is not here. Processes of one machine take turns.

        A file that changed after the index was written (by an interrupted push) is used as it is: checkpoints
        and models carry digests, so their readers detect incomplete ones.
        """
        with locked(os.path.join(self.local, ".pull.lock")):
            listed = self._listed()
            if not listed:
                self._forget()
            for name, digest in listed.items():
                path = storage.join(self.local, name)
                if not (os.path.isfile(path) and storage.digest_file(path) == digest):
                    self._fetch(name, path, digest)
                self._known[name] = (*_stamp(path), digest)

    def push(self) -> None:
        """Copies new files, then the index, then removes deleted files. To be called by one process only."""
        digests = {}
        for name in _files(self.local):
            path = storage.join(self.local, name)
            stamp, known = _stamp(path), self._known.get(name)
            if known is None or known[:2] != stamp:
                digest = storage.digest_file(path)
                if known is None or known[2] != digest:
                    with storage.publishing(storage.join(self.remote, name)) as draft:
                        shutil.copyfile(path, draft)
                self._known[name] = known = (*stamp, digest)
            digests[name] = known[2]
        gone = self._known.keys() - digests.keys()
        storage.publish_json(storage.join(self.remote, INDEX), {"files": digests})
        for name in gone:
            storage.remove(storage.join(self.remote, name))
            del self._known[name]

    def _forget(self) -> None:
        """Handles a missing remote index: local files belong to a removed student, unless one is in
        training."""
        with contextlib.suppress(UserError), exclusive(self.local):
            for name in _files(self.local):
                os.unlink(os.path.join(self.local, name))

    def _listed(self) -> dict[str, str]:
        path = storage.join(self.remote, INDEX)
        if not storage.exists(path):
            return {}
        content = storage.read_json(path)
        files = content.get("files") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
            raise UserError(f"{path}: is damaged; remove the student's directory to start afresh")
        return files

    def _fetch(self, name: str, path: str, digest: str) -> None:
        source = storage.join(self.remote, name)
        try:
            storage.fetch(source, path, digest)
        except WrongContent:  # it changed after the index was written
            with (
                storage.publishing(path) as draft,
                storage.open_binary(source) as remote,
                open(draft, "wb") as file,
            ):
                shutil.copyfileobj(remote, file, storage.CHUNK)


@contextlib.contextmanager
def mirrored(directory: str, cache_dir: str | None) -> Iterator[Mirror | None]:
    """The mirror of a remote ``directory``, pulled; None for a local one.

    It stays in ``cache_dir``, so that the next start on this machine fetches nothing again; without one it is
    in the system's temporary directory, readable by this user alone.
    """
    if not storage.is_remote(directory):
        yield None
        return
    name = storage.digest_bytes(directory.encode()).rpartition(":")[2]
    base = cache_dir or _private(os.path.join(tempfile.gettempdir(), f"distillation-{os.getuid()}"))
    mirror = Mirror(directory, os.path.join(base, f"student-{name}"))
    try:
        os.makedirs(mirror.local, mode=0o700, exist_ok=True)
    except OSError as problem:
        raise UserError(f"{mirror.local}: cannot be made ({problem}); set train.cache_dir") from None
    mirror.pull()
    yield mirror


def _private(path: str) -> str:
    """A directory with a predictable name; it is used only if this user owns it and others cannot access
    it."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    if status.st_uid != os.getuid() or status.st_mode & 0o777077 != 0o040000:
        raise UserError(f"{path}: is not a private directory of this user; remove it or set train.cache_dir")
    return path


def _files(root: str) -> list[str]:
    """Names below ``root``, tensors before the files that hold their digests."""
    found = []
    for folder, directories, names in os.walk(root):
        directories[:] = [
            name for name in directories if not name.startswith(_OWN) and ".damaged-" not in name
        ]
        found += [
            os.path.relpath(os.path.join(folder, name), root) for name in names if not name.startswith(_OWN)
        ]
    return sorted(found, key=lambda name: (name.endswith(("state.json", "model.json")), name))


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
