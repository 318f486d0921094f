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

from evaluation.sources.catalogue import find_task
from evaluation.sources.loading import load
from evaluation.tasks.answer_spans import read_questions
from infra.files import storage
from infra.settings.recipe_file import load_recipe
from infra.settings.sections import Corpus, CorpusSource
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import parts
from offline_teacher.corpus.problems import Problems
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.index import TaskIndex, shard_file
from offline_teacher.store.paths import CONFIG, MANIFEST, SPEC, WEIGHTS
from offline_teacher.store.records import encode
from offline_teacher.store.store import Store, open_store
from offline_teacher.store.unfinished import read_part_index, read_spec
from offline_teacher.verification.verify import verify
from tests.fuzz.mutations import mutate_bytes, mutate_json
from tests.store.synthetic import make_store, small_plan

TASK = "e000-p00000-0000"

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
    """Every section of every recipe, with the name that each recipe needs: short, so that damage is dense."""
    path = directory / "recipe.yaml"
    wholes = []
    for recipe in sorted((Path(__file__).parents[2] / "infra" / "recipes").glob("*.yaml")):
        text = "\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("#"))
        items = {
            item.partition(":")[0]: item for item in re.findall(r"^\S[^\n]*(?:\n(?!\S)[^\n]*)*", text, re.M)
        }
        needed = items["name"]
        wholes += [f"{needed}\n{item}".encode() for name, item in items.items() if item not in needed]

    def read(data: bytes) -> object:
        _put(path, data)
        return load_recipe(str(path)).to_yaml()

    return wholes, read


def _small_store(directory: Path) -> Store:
    """One task of three samples in two shards."""
    plan = small_plan(masking_epochs=1, block_samples=1)
    return make_store(str(directory / "store"), rows={"train": (3,)}, plan=plan)


def _read_all(root: str) -> object:
    """All that a student reads of a store."""
    store = open_store(root)
    reader = BlockReader(store, "train", list(store.layout.data_columns()))
    blocks = range(min(store.splits["train"].plan.blocks_per_epoch, 10))
    columns = [array.tobytes() for block in blocks for array in reader.rows(0, block).values()]
    return columns, store.tokenizer_files(), store.teacher_config(), store.teacher_weights()


def _with_manifest(store: Store, **changes: object) -> None:
    """A manifest that vouches for what was changed, as its author can."""
    manifest = dataclasses.replace(store.manifest, **changes)  # type: ignore[arg-type]
    _put(Path(store.root, MANIFEST), manifest.to_bytes())


def _manifest(directory: Path) -> tuple[list[bytes], Read]:
    store = _small_store(directory)
    path = Path(store.root, MANIFEST)
    whole = path.read_bytes()

    def read(data: bytes) -> object:
        _put(path, data)
        assert isinstance(verify(store.root), list)
        return _read_all(store.root)

    return [whole], read


def _spec(directory: Path) -> tuple[list[bytes], Read]:
    """Of a finished store whose manifest vouches for it, and of an unfinished one."""
    store = _small_store(directory)
    path = Path(store.root, SPEC)
    whole = path.read_bytes()

    def read(data: bytes) -> object:
        _put(path, data)
        _with_manifest(store, spec=storage.digest_bytes(data))
        read_spec(store.root)
        return _read_all(store.root)

    return [whole], read


def _index(directory: Path) -> tuple[list[bytes], Read]:
    """The index of a task, for which the manifest vouches."""
    store = _small_store(directory)
    path = Path(store.root, "tasks", "train", f"{TASK}.json")
    whole = path.read_bytes()

    def read(data: bytes) -> object:
        _put(path, data)
        _vouch_for_index(store, data)
        assert isinstance(verify(store.root), list)
        return _read_all(store.root)

    return [whole], read


def _vouch_for_index(store: Store, data: bytes) -> None:
    train = dataclasses.replace(store.manifest.splits["train"], tasks=(storage.digest_bytes(data),))
    _with_manifest(store, splits={"train": train})


def _shard(directory: Path) -> tuple[list[bytes], Read]:
    """The author of the shard wrote index and manifest too, so that its digest fits."""
    store = _small_store(directory)
    folder = Path(store.root, "shards", "train", TASK)
    index_path = Path(store.root, "tasks", "train", f"{TASK}.json")
    index = TaskIndex.from_bytes(index_path.read_bytes())
    whole = (folder / index.shards[0].file).read_bytes()
    (folder / index.shards[0].file).unlink()
    kept = {index.shards[1].file}

    def read(data: bytes) -> object:
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()  # a mapped file keeps its inode
        name = shard_file(storage.digest_bytes(data))
        _put(folder / name, data)
        first = dataclasses.replace(index.shards[0], file=name, bytes=len(data))
        changed = dataclasses.replace(index, shards=(first, *index.shards[1:])).to_bytes()
        _put(index_path, changed)
        _vouch_for_index(store, changed)
        assert isinstance(verify(store.root), list)
        return _read_all(store.root)

    return [whole], read


def _part(directory: Path) -> tuple[list[bytes], Read]:
    """The index of a part of the text; verify goes on to the file that it names."""
    store = _small_store(directory)
    path = Path(store.root, "sequences", "train", "part-00000.json")
    whole = path.read_bytes()

    def read(data: bytes) -> object:
        _put(path, data)
        assert isinstance(verify(store.root), list)
        return read_part_index(store.root, "train", 0)

    return [whole], read


def _teacher(name: str) -> Callable[[Path], tuple[list[bytes], Read]]:
    """Configuration or weights of a teacher whose top is replayed; the manifest vouches for them."""

    def prepare(directory: Path) -> tuple[list[bytes], Read]:
        from offline_teacher.inputs.stored_teacher import stored_top
        from tests.offline_teacher.local_pool import make
        from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text

        text = write_text(directory / "text.txt", 3)
        recipe = write_recipe(directory, text, save_bert(directory / "model"), store={"replay_layers": 1})
        store = make(recipe)
        path = Path(store.root, name)
        whole = path.read_bytes()

        def read(data: bytes) -> object:
            _put(path, data)
            files = {**store.manifest.files, name: storage.digest_bytes(data)}
            _with_manifest(store, files=files)
            return stored_top(open_store(store.root))

        return [whole], read

    return prepare


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


def _corpus(source: CorpusSource, wholes: dict[str, bytes]) -> Callable[[Path], tuple[list[bytes], Read]]:
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
    """Half of the time the content is changed and digested again, to meet the checks behind the digest."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    tree = mutate_json(rng, data)
    try:
        if isinstance(tree, dict):
            tree.pop("digest", None)
            return encode(tree)
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
    "spec": Reader(_spec, _sealed),
    "index": Reader(_index, _sealed),
    "part": Reader(_part, _sealed),
    "shard": Reader(_shard),
    "configuration": Reader(_teacher(CONFIG), _json),
    "weights": Reader(_teacher(WEIGHTS), _safetensors),
    "tsv": Reader(_tsv),
    "text": Reader(_corpus("text", {".txt": _LINES.encode(), **_compressed(_LINES.encode() * 5)})),
    "jsonl": Reader(_corpus("jsonl", {".jsonl": "\n".join(map(json.dumps, _ROWS)).encode()})),
    "parquet": Reader(
        _corpus("parquet", {f".{name}.parquet": _parquet(name) for name in ("none", "snappy", "zstd")})
    ),
    "squad": Reader(_squad, _json),
}
