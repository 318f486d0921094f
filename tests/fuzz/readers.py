"""The readers of untrusted files. Each gives a valid result or the one clear ``UserError``."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from offline_teacher.store.sealed import content_digest, seal

from evaluation.tasks.catalogue import find_task
from evaluation.tasks.loading import load
from evaluation.tasks.squad import read_questions
from infra import storage
from infra.recipe import load_recipe
from infra.sections import Corpus
from offline_teacher.corpus import documents, parts
from offline_teacher.corpus_problems import Problems
from offline_teacher.store.manifest import MANIFEST_NAME, Sidecar, shard_path
from offline_teacher.store.reader import Store, open_store
from offline_teacher.store.writer import missing_shards, read_declaration
from tests.fuzz.mutations import mutate_bytes, mutate_json
from tests.store.synthetic import make_store

Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Reader:
    prepare: Callable[[Path], tuple[list[bytes], Read]]
    """(empty directory) -> whole inputs to damage, and what reads one."""
    mutate: Callable[[random.Random, bytes], bytes] = mutate_bytes


def _put(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:  # not published: a hundred thousand times fsync
        file.write(data)


def _recipe(directory: Path) -> tuple[list[bytes], Read]:
    """Every section of every recipe, with the two that each recipe needs: short, so that damage is dense."""
    path = directory / "recipe.yaml"
    wholes = []
    for recipe in sorted((Path(__file__).parents[2] / "infra" / "recipes").glob("*.yaml")):
        text = "\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("#"))
        items = {
            item.partition(":")[0]: item for item in re.findall(r"^\S[^\n]*(?:\n(?!\S)[^\n]*)*", text, re.M)
        }
        needed = "\n".join(items[name] for name in ("name", "corpus", "teacher"))
        wholes += [f"{needed}\n{item}".encode() for name, item in items.items() if item not in needed]

    def read(data: bytes) -> object:
        _put(path, data)
        return load_recipe(str(path)).to_yaml()

    return wholes, read


def _manifest(directory: Path) -> tuple[list[bytes], Read]:
    store = make_store(str(directory / "store"))
    path = Path(store.root, MANIFEST_NAME)
    whole = path.read_bytes()

    def read(data: bytes) -> object:
        _put(path, data)
        opened = open_store(store.root)
        opened.shard(0, 0)
        opened.head()
        return opened.tokenizer_files(), opened.teacher_config()

    return [whole], read


def _declaration(directory: Path) -> tuple[list[bytes], Read]:
    store = make_store(str(directory / "store"))
    path = Path(store.root, "declaration.json")
    Path(store.root, MANIFEST_NAME).unlink()

    def read(data: bytes) -> object:
        _put(path, data)
        declaration = read_declaration(store.root)
        if declaration.plan.total > 10_000:  # listing what is missing of it takes its time, honestly
            return declaration
        return missing_shards(store.root, declaration)

    return [path.read_bytes()], read


def _sidecar(directory: Path) -> tuple[list[bytes], Read]:
    """The writer calls a bad one "no sidecar"; what it must not do is raise anything but ValueError."""
    store = make_store(str(directory / "store"))
    whole = Path(store.root, "shards", "r000-00000000.json").read_bytes()

    def read(data: bytes) -> object:
        try:
            return Sidecar.from_bytes(data)
        except ValueError:
            return None

    return [whole], read


def _shard(directory: Path) -> tuple[list[bytes], Read]:
    """The writer of the shard wrote the manifest too, so the digest fits; every value is then read."""
    store = make_store(str(directory / "store"))
    path = Path(shard_path(store.root, 0, 0))
    whole = path.read_bytes()
    path.unlink()

    def read(data: bytes) -> object:
        if path.exists():
            path.unlink()  # a mapped file keeps its inode
        _put(path, data)
        digests = [storage.digest_bytes(data), *store.manifest.shard_digests[1:]]
        hostile = Store(store.root, dataclasses.replace(store.manifest, shard_digests=digests))
        return [column.tobytes() for column in hostile.shard(0, 0).columns.values()]

    return [whole], read


def _head(directory: Path) -> tuple[list[bytes], Read]:
    store = make_store(str(directory / "store"))
    path = Path(store.root, "teacher", "mlm_head.safetensors")
    whole = path.read_bytes()

    def read(data: bytes) -> object:
        _put(path, data)
        files = {**store.manifest.files, "teacher/mlm_head.safetensors": storage.digest_bytes(data)}
        return Store(store.root, dataclasses.replace(store.manifest, files=files)).head()

    return [whole], read


_TABLES = {
    "CoLA": "gj04\t1\t\tThe cat sat.\ngj04\t0\t*\tThe sat cat.\n",
    "SST-2": "sentence\tlabel\na fine film \t1\nno \t0\n",
    "MRPC": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    '1\t1\t2\tHe said "so\tSo he said\n0\t3\t4\ta\tb\n',
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tnews\tf\t2012\t1\tnone\tnone\tA man.\tA woman.\t2.5\n",
}


def _tsv(directory: Path) -> tuple[list[bytes], Read]:
    tasks = [find_task(name) for name in _TABLES]
    for task in tasks:
        os.makedirs(directory / task.name)

    def read(data: bytes) -> object:
        task = tasks[data[0] % len(tasks)]  # the first byte says whose file the rest is
        _put(directory / task.name / "train.tsv", data[1:])
        return load(task, "train", str(directory)).digest()

    return [bytes([number]) + text.encode() for number, text in enumerate(_TABLES.values())], read


def _squad(directory: Path) -> tuple[list[bytes], Read]:
    answers = [{"answer_start": 0, "text": "Paris"}]
    paragraph = {"context": "Paris is big.", "qas": [{"id": "1", "question": "What?", "answers": answers}]}
    whole = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}
    path = directory / "train-v1.1.json"

    def read(data: bytes) -> object:
        _put(path, data)
        return read_questions(str(path))

    return [json.dumps(whole).encode()], read


_LINES = "One line.\nAnother, with ümläuts.\n\nA block\nof two lines.\n\n"
_ROWS = [{"text": "One row.", "n": 1}, {"text": "Another, with \u00fc.", "n": None}, {"text": ""}]


def _corpus(source: str, wholes: dict[str, bytes]) -> Callable[[Path], tuple[list[bytes], Read]]:
    """Listing and reading a corpus file; ``wholes``: what a file of each ending holds."""

    def prepare(directory: Path) -> tuple[list[bytes], Read]:
        endings = sorted(wholes)

        def read(data: bytes) -> object:
            path = directory / f"part{endings[data[0] % len(endings)]}"  # the first byte says which file
            _put(path, data[1:])
            corpus = Corpus(path=(str(path),), source=source)
            problems = Problems()
            texts = [list(documents(part, corpus, problems)) for part in parts(corpus, 64)]
            return texts, problems.summary()

        return [bytes([number]) + wholes[ending] for number, ending in enumerate(endings)], read

    return prepare


def _compressed(text: bytes) -> dict[str, bytes]:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(text)
    return {".gz": gzip.compress(text, mtime=0), ".zst": bytes(sink.getvalue())}


def _parquet(compression: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_ROWS * 3), sink, compression=compression, row_group_size=4)
    return sink.getvalue()


def _sealed(rng: random.Random, data: bytes) -> bytes:
    """Half of the time the content is changed and sealed again, to meet the checks behind the seal."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    tree = mutate_json(rng, data)
    try:
        if isinstance(tree, dict):
            tree.pop("digest", None)
            return seal(tree)
        content_digest(tree)
    except (ValueError, TypeError):
        pass
    return json.dumps(tree).encode()


def _json(rng: random.Random, data: bytes) -> bytes:
    return mutate_bytes(rng, data) if rng.random() < 0.5 else json.dumps(mutate_json(rng, data)).encode()


def _safetensors(rng: random.Random, data: bytes) -> bytes:
    """Half of the time the JSON header is changed and its length put right."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    (length,) = struct.unpack_from("<Q", data)
    header = json.dumps(mutate_json(rng, data[8 : 8 + length])).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


READERS = {
    "recipe": Reader(_recipe),
    "manifest": Reader(_manifest, _sealed),
    "declaration": Reader(_declaration, _sealed),
    "sidecar": Reader(_sidecar, _sealed),
    "shard": Reader(_shard),
    "head": Reader(_head, _safetensors),
    "tsv": Reader(_tsv),
    "text": Reader(_corpus("text", {".txt": _LINES.encode(), **_compressed(_LINES.encode() * 5)})),
    "jsonl": Reader(_corpus("jsonl", {".jsonl": "\n".join(map(json.dumps, _ROWS)).encode()})),
    "parquet": Reader(
        _corpus("parquet", {f".{name}.parquet": _parquet(name) for name in ("none", "snappy", "zstd")})
    ),
    "squad": Reader(_squad, _json),
}
