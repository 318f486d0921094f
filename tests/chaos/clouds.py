"""``python -m tests.chaos.clouds gs://bucket abfs://container@account``: tests storage on any object store.

Writes below ``<URL>/storage-check`` and removes it again. Credentials and emulators are those that the
store's package finds. Prints one line per URL; exits 1 if a result differs from that on a local disk.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.files import paths, storage
from infra.files.cache import Cache
from tests.chaos.arguments import described

DATA = random.Random(0).randbytes(20 << 20)


def actions(root: str, cache: Cache) -> Iterator[Any]:
    """Calls the functions of storage one after the other, and yields their results."""
    path, other = storage.join(root, "run", "a.bin"), storage.join(root, "run", "b.json")
    yield storage.exists(path)
    yield storage.list_names(root)
    storage.publish_bytes(path, DATA)
    storage.publish_json(other, {"b": [1], "a": None})
    with storage.publishing(storage.join(root, "run", "deep", "c.txt")) as draft:
        Path(draft).write_text("one\ntwo\n")
    yield storage.exists(path), storage.exists(storage.join(root, "run")), storage.size(path)
    yield storage.list_names(storage.join(root, "run")), storage.list_names(root)
    yield storage.read_bytes(path) == DATA, storage.read_json(other)
    yield storage.digest_file(path)
    yield [name.rpartition("/run/")[2] for name in paths.find_files([storage.join(root, "run", "*.*")])]
    yield [storage.size(name) for name in paths.find_files([storage.join(root, "run", "*.*")])]
    with storage.open_binary(storage.join(root, "run", "deep", "c.txt")) as stream:
        yield list(stream)
    with storage.open_binary(path) as stream:
        stream.seek(len(DATA) - 5)
        yield stream.read(9)
    yield Path(cache.local_path(path, storage.digest_bytes(DATA))).read_bytes() == DATA
    storage.publish_bytes(path, b"")
    yield storage.read_bytes(path), storage.size(path)
    storage.remove(path)
    storage.remove(path)
    yield storage.list_names(storage.join(root, "run"))
    storage.remove_tree(root)
    storage.remove_tree(root)
    yield storage.list_names(root), storage.exists(other)


def main() -> int:
    parser = described(__doc__)
    parser.add_argument("urls", nargs="+", metavar="URL")
    wrong = 0
    for url in parser.parse_args().urls:
        with tempfile.TemporaryDirectory() as directory:
            cache = Cache(None, 1 << 30)
            here = actions(storage.join(directory, "storage-check"), cache)
            there = actions(storage.join(url, "storage-check"), cache)
            other = [(a, b) for a, b in zip(here, there, strict=True) if a != b]
        print(f"{url}: {f'differs: {other[0]}' if other else 'as on a local disk'}")
        wrong += bool(other)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
