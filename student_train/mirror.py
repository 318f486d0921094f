"""A local copy of a student's directory on an object store: training writes the copy, ``push`` uploads it.

    with mirrored("s3://bucket/runs/name/student", cache_dir) as mirror:   # None if the directory is local
        ... work in mirror.local ...
        mirror.push()                                                      # after every checkpoint

The remote index, ``files.json``, is written after the files that it lists. Remote files that the index does
not list are left over from an interrupted push.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Container, Iterator

from infra.errors import UserError, WrongContent
from infra.files import storage
from infra.files.locks import exclusive, locked

INDEX = "files.json"
_NOT_COPIED = (storage.UNFINISHED, storage.LOCK, ".pull")
"""Prefixes of file names that are not copied."""


class Mirror:
    """A remote directory, ``remote``, and its private local copy, ``local``."""

    def __init__(self, remote: str, local: str) -> None:
        self.remote, self.local = remote, local
        self._copied: dict[str, tuple[int, int, str]] = {}
        """Name -> size, modification time and digest of a local file when it was last pushed or pulled."""

    def pull(self) -> None:
        """Downloads every file that the index lists and the local directory lacks. Processes take turns.

        If the index is not the one that was last copied, another machine has trained the student, or its
        remote directory was removed; then local files that the index does not list are removed. An
        interrupted push may have replaced a file but not the index. Such a file is downloaded too:
        checkpoints and models contain digests, so their readers detect incomplete ones. Returns at
        once if a training holds the lock of the local directory.
        """
        with contextlib.ExitStack() as locks:
            locks.enter_context(locked(os.path.join(self.local, ".pull.lock")))
            try:
                locks.enter_context(exclusive(self.local))
            except UserError:
                return
            digests = self._read_index()
            if digests != storage.read_object(self._last_index) or not digests:
                self._remove_local_files(except_for=digests)
            for name, digest in digests.items():
                path = storage.join(self.local, name)
                if not (os.path.isfile(path) and storage.digest_file(path) == digest):
                    self._fetch(name, path, digest)
                self._copied[name] = (*_size_and_time(path), digest)
            storage.publish_json(self._last_index, digests)

    def push(self) -> None:
        """Uploads changed files, then the index, and removes remote files that the local copy no longer has.
        Only one process may call it."""
        digests = {}
        for name in _files(self.local):
            path = storage.join(self.local, name)
            size_and_time, copied = _size_and_time(path), self._copied.get(name)
            if copied is None or copied[:2] != size_and_time:
                digest = storage.digest_file(path)
                if copied is None or copied[2] != digest:
                    with storage.publishing(storage.join(self.remote, name)) as draft:
                        shutil.copyfile(path, draft)
                self._copied[name] = copied = (*size_and_time, digest)
            digests[name] = copied[2]
        gone = self._copied.keys() - digests.keys()
        storage.publish_json(storage.join(self.remote, INDEX), {"files": digests})
        storage.publish_json(self._last_index, digests)
        for name in gone:
            storage.remove(storage.join(self.remote, name))
            del self._copied[name]

    @property
    def _last_index(self) -> str:
        """Local file with the files of the index that was last pulled or pushed."""
        return os.path.join(self.local, ".pulled.json")

    def _remove_local_files(self, except_for: Container[str]) -> None:
        """Removes local files that are not in ``except_for``, and then empty folders. An empty checkpoint
        folder would count as a damaged checkpoint."""
        for name in _files(self.local):
            if name not in except_for:
                os.unlink(os.path.join(self.local, name))
        for folder, _, _ in os.walk(self.local, topdown=False):
            if folder != self.local and not os.listdir(folder):
                os.rmdir(folder)

    def _read_index(self) -> dict[str, str]:
        """Returns the index, name -> digest; {} if there is none. Raises UserError if it is damaged."""
        path = storage.join(self.remote, INDEX)
        if not storage.exists(path):
            return {}
        content = storage.read_json(path)
        files = content.get("files") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
            raise UserError(f"{path}: is damaged; remove the student's directory to start over")
        return files

    def _fetch(self, name: str, path: str, digest: str) -> None:
        """Downloads a remote file to ``path``, also if its digest is no longer ``digest``."""
        source = storage.join(self.remote, name)
        try:
            storage.fetch(source, path, digest)
        except WrongContent:  # the file changed after the index was written
            with (
                storage.publishing(path) as draft,
                storage.open_binary(source) as old,
                open(draft, "wb") as new,
            ):
                shutil.copyfileobj(old, new, storage.CHUNK)


@contextlib.contextmanager
def mirrored(directory: str, cache_dir: str | None) -> Iterator[Mirror | None]:
    """Yields the mirror of a remote ``directory``, after a pull; None if ``directory`` is local.

    The local copy stays in ``cache_dir``, so that the next start on this machine downloads nothing again.
    Without ``cache_dir`` it is in the system's temporary directory, readable by this user alone.
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
        raise UserError(
            f"{mirror.local}: cannot be created ({problem}); set train.cache_dir to a writable directory"
        ) from None
    mirror.pull()
    yield mirror


def _private(path: str) -> str:
    """Creates the directory ``path`` if needed, and returns ``path``. Raises UserError if another user owns
    the directory or can access it, which is possible because its name is predictable."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    if status.st_uid != os.getuid() or status.st_mode & 0o777077 != 0o040000:
        raise UserError(f"{path}: is not a private directory of this user; remove it or set train.cache_dir")
    return path


def _files(root: str) -> list[str]:
    """Returns the files below ``root``, as relative paths, tensors before the files with their digests."""
    paths = []
    for folder, directories, names in os.walk(root):
        copied = [name for name in directories if not name.startswith(_NOT_COPIED)]
        directories[:] = [name for name in copied if ".damaged-" not in name]
        files = [os.path.join(folder, name) for name in names if not name.startswith(_NOT_COPIED)]
        paths += [os.path.relpath(file, root) for file in files]
    return sorted(paths, key=lambda name: (name.endswith(("state.json", "model.json")), name))


def _size_and_time(path: str) -> tuple[int, int]:
    """Returns size and modification time in nanoseconds."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
