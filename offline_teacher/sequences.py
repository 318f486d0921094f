"""Documents become numbered sequences of L token ids, one Arrow file a part, in any order by any worker.

A part is tokenised, packed and published on its own (``build_part``); ``finish_index`` then numbers the
sequences of all parts in order and writes ``sequences/index.json``, last. Shapes: n sequences, L length,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from infra import storage
from infra.cache import Cache
from infra.errors import UserError
from infra.sections import Corpus, Sequences
from offline_teacher.corpus import Part, documents, modified
from offline_teacher.corpus_problems import Problems
from offline_teacher.packing import Encoder, TextSeen, batched, load_encoder, pack
from offline_teacher.store.sealed import read_sealed, seal, unseal

FORMAT_VERSION = 2
OPEN_PARTS = 64
PARALLEL_READS = 16


# One part


def _folder(store_dir: str) -> str:
    return storage.join(store_dir, "sequences")


def _part_file(store_dir: str, index: int, suffix: str) -> str:
    return storage.join(_folder(store_dir), f"part-{index:05d}{suffix}")


def _made_from(part: Part, corpus: Corpus, settings: Sequences, encoder: Encoder) -> str:
    """Digest of all that decides a part's content except the bytes of its files, and not of their names."""
    recipe = [
        {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if f.metadata["outcome"]}
        for section in (corpus, settings)
    ]
    spans = [(span.start, span.stop, span.stamp) for span in part.spans]
    return storage.digest_bytes(
        json.dumps([FORMAT_VERSION, recipe, part.split, spans, encoder.digest], sort_keys=True).encode()
    )


def _read_sidecar(store_dir: str, index: int) -> dict[str, Any] | None:
    """None where it is absent or damaged: the part is built again."""
    path = _part_file(store_dir, index, ".json")
    try:
        return storage.read_checked(path, unseal) if storage.exists(path) else None
    except ValueError:
        return None


def _current(
    store_dir: str, index: int, part: Part, corpus: Corpus, settings: Sequences, encoder: Encoder
) -> dict[str, Any] | None:
    """The sidecar of a part that need not be built again.

    Its recipe and sizes are compared, and, as make does, that no local file of it was written after it.
    """
    path = _part_file(store_dir, index, ".json")
    sidecar = _made(store_dir, index, part, corpus, settings, encoder)
    if sidecar is not None and not storage.is_remote(path) and modified(part) >= os.stat(path).st_mtime:
        return None
    return sidecar


def _made(
    store_dir: str, index: int, part: Part, corpus: Corpus, settings: Sequences, encoder: Encoder
) -> dict[str, Any] | None:
    """The sidecar of a part that is there, of this recipe and text of these sizes."""
    sidecar = _read_sidecar(store_dir, index)
    if sidecar is None or sidecar["made_from"] != _made_from(part, corpus, settings, encoder):
        return None
    if corpus.strict and sidecar["problems"]["counts"]:  # found when it was not: to be refused now
        return None
    data = _part_file(store_dir, index, ".arrow")
    if not storage.exists(data) or storage.size(data) != sidecar["bytes"]:
        return None
    return sidecar


def outstanding(store_dir: str, parts: Sequence[Part], corpus: Corpus, settings: Sequences) -> list[int]:
    """Indexes of the parts that ``build_part`` would have to build; reads sidecars only.

    Raises UserError where the store is finished and had another number of parts.
    """
    finished = read_index(store_dir)
    if finished is not None and len(finished.part_sequences) != len(parts):
        raise UserError(
            f"{store_dir}: was made of a corpus of {len(finished.part_sequences)} parts, this one has "
            f"{len(parts)}; restore the text, or make a new store"
        )
    encoder = load_encoder(storage.join(store_dir, "tokenizer"))
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        current = pool.map(
            lambda item: _current(store_dir, item[0], item[1], corpus, settings, encoder), enumerate(parts)
        )
        return [index for index, sidecar in enumerate(current) if sidecar is None]


def refuse_other_text(store_dir: str, parts: Sequence[Part], corpus: Corpus, settings: Sequences) -> None:
    """UserError where the text is, by its parts and their sizes, not what the sequences were made of."""
    outstanding(store_dir, parts, corpus, settings)
    encoder = load_encoder(storage.join(store_dir, "tokenizer"))
    for index, part in enumerate(parts):
        sidecar = _read_sidecar(store_dir, index)
        if sidecar is not None and sidecar["made_from"] != _made_from(part, corpus, settings, encoder):
            raise UserError(
                f"{part.spans[0].path}: part {index} of {store_dir} was made of other text; restore the text"
            )


def build_part(store_dir: str, index: int, part: Part, corpus: Corpus, settings: Sequences) -> dict[str, Any]:
    """Publishes ``sequences/part-<index>.arrow`` and its sidecar, unless they are there; returns the sidecar.

    Uses the tokenizer in ``store_dir/tokenizer``. Depends on its arguments alone and holds one batch of
    text at a time. Raises UserError, and publishes nothing, where ``index.json`` is written already and
    the corpus has changed since.
    """
    encoder = load_encoder(storage.join(store_dir, "tokenizer"))
    sidecar = _current(store_dir, index, part, corpus, settings, encoder)
    if sidecar is not None:
        return sidecar
    finished = read_index(store_dir)
    with storage.publishing(_part_file(store_dir, index, ".arrow")) as temporary:
        sidecar, token_counts = _write_part(temporary, part, corpus, settings, encoder)
        if finished is not None and finished.part_digests[index : index + 1] != [sidecar["part_digest"]]:
            files = " to ".join(sorted({part.spans[0].path, part.spans[-1].path}))
            raise UserError(
                f"{files}: part {index} of the corpus no longer gives the sequences that {store_dir} was "
                f"made of; restore the text, or make a new store"
            )
    counts = _sparse_counts(token_counts)
    storage.publish_bytes(_part_file(store_dir, index, ".counts.arrow"), counts)
    sidecar["counts_digest"] = storage.digest_bytes(counts)
    sidecar["made_from"] = _made_from(part, corpus, settings, encoder)
    storage.publish_bytes(_part_file(store_dir, index, ".json"), seal(sidecar))
    return sidecar


def _write_part(
    path: str, part: Part, corpus: Corpus, settings: Sequences, encoder: Encoder
) -> tuple[dict[str, Any], np.ndarray]:
    """Writes the part's Arrow file; returns its sidecar and how often each id occurs [V] int64."""
    problems = Problems(corpus.strict)
    text = TextSeen()
    token_counts = np.zeros(encoder.vocab_size, np.int64)
    sequences = tokens = 0
    schema = _schema(encoder.dtype, settings.length)
    with pa.ipc.new_file(path, schema) as writer:
        batches = batched(documents(part, corpus, problems), text)
        for input_ids, token_count in pack(batches, encoder, settings):
            sequences += len(input_ids)
            tokens += int(token_count.sum())
            token_counts += np.bincount(input_ids.ravel(), minlength=encoder.vocab_size)
            ids = pa.FixedSizeListArray.from_arrays(pa.array(input_ids.ravel()), settings.length)
            writer.write_batch(pa.record_batch([ids, pa.array(token_count)], schema=schema))
    token_counts[list(encoder.special_ids)] = 0
    sidecar = {
        "bytes": os.path.getsize(path),
        "part_digest": storage.digest_file(path),
        "text_digest": f"xxh3-128:{text.digest.hexdigest()}",
        "documents": text.documents,
        "text_bytes": text.text_bytes,
        "sequences": sequences,
        "tokens": tokens,
        "problems": problems.to_json(),
    }
    return sidecar, token_counts


def _schema(dtype: type[np.unsignedinteger], length: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field(
                "input_ids", pa.list_(pa.field("item", pa.from_numpy_dtype(dtype)), length), nullable=False
            ),
            pa.field("token_count", pa.uint16(), nullable=False),
        ]
    )


def _sparse_counts(token_counts: np.ndarray) -> bytes:
    (present,) = np.nonzero(token_counts)
    return _arrow_bytes({"token": present.astype(np.uint32), "count": token_counts[present]})


def _arrow_bytes(columns: dict[str, np.ndarray]) -> bytes:
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


# All parts


@dataclass(frozen=True)
class Index:
    """``sequences/index.json``. ``sequence_id`` counts through the parts in order, from 0."""

    format_version: int
    length: int
    packing: str
    vocab_size: int
    part_sequences: list[int]
    part_digests: list[str]
    corpus_digest: str
    """Over the text of all parts in order: free of file names, tokenizer and workers."""
    token_counts_digest: str
    documents: int
    text_bytes: int
    tokens: int
    """Special tokens included, padding not."""
    problems: dict[str, Any]

    @property
    def count(self) -> int:
        return sum(self.part_sequences)


def read_index(store_dir: str) -> Index | None:
    """None unless ``finish_index`` has run. UserError where the file is damaged."""
    path = storage.join(_folder(store_dir), "index.json")
    if not storage.exists(path):
        return None
    try:
        index = Index(**read_sealed(path, "delete it and run again"))
    except TypeError:
        raise UserError(f"{path}: is of another version; delete it and run again") from None
    return index


def finish_index(store_dir: str, parts: Sequence[Part], corpus: Corpus, settings: Sequences) -> Index:
    """Numbers the sequences of all parts and publishes the token counts, then the index.

    Raises UserError where a part is missing or of another corpus, where no sequence came of the whole corpus,
    or where an index of another corpus is there.
    """
    encoder = load_encoder(storage.join(store_dir, "tokenizer"))
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        sidecars = list(
            pool.map(
                lambda item: _made(store_dir, item[0], item[1], corpus, settings, encoder),
                enumerate(parts),
            )
        )
        missing = [part for part, sidecar in enumerate(sidecars) if sidecar is None]
        if missing:
            raise UserError(
                f"{_folder(store_dir)}: {len(missing)} parts are missing, first {missing[0]}; run again"
            )
        made = [sidecar for sidecar in sidecars if sidecar is not None]
        problems = Problems.merged(sidecar["problems"] for sidecar in made)
        if not sum(sidecar["sequences"] for sidecar in made):
            found = problems.summary()
            raise UserError(
                f"the corpus has no usable document{': ' + found if found else ', its files are empty'}"
            )
        token_counts = np.zeros(encoder.vocab_size, np.int64)
        digests = [sidecar["counts_digest"] for sidecar in made]
        for tokens, counts in pool.map(_read_counts, [store_dir] * len(parts), range(len(parts)), digests):
            token_counts[tokens] += counts
    data = _arrow_bytes({"count": token_counts})
    index = Index(
        format_version=FORMAT_VERSION,
        length=settings.length,
        packing=settings.packing,
        vocab_size=encoder.vocab_size,
        part_sequences=[sidecar["sequences"] for sidecar in made],
        part_digests=[sidecar["part_digest"] for sidecar in made],
        corpus_digest=storage.digest_bytes("".join(sidecar["text_digest"] for sidecar in made).encode()),
        token_counts_digest=storage.digest_bytes(data),
        documents=sum(sidecar["documents"] for sidecar in made),
        text_bytes=sum(sidecar["text_bytes"] for sidecar in made),
        tokens=sum(sidecar["tokens"] for sidecar in made),
        problems=problems.to_json(),
    )
    before = read_index(store_dir)
    if before is not None and before.part_digests != index.part_digests:
        raise UserError(f"{store_dir}: was made of another corpus; restore the text, or make a new store")
    _remove_parts_from(store_dir, len(parts))
    storage.publish_bytes(storage.join(_folder(store_dir), "token_counts.arrow"), data)
    storage.publish_bytes(storage.join(_folder(store_dir), "index.json"), seal(dataclasses.asdict(index)))
    return index


def _remove_parts_from(store_dir: str, count: int) -> None:
    """Those of an earlier attempt, which cut the text into more parts."""
    for name in storage.list_names(_folder(store_dir)):
        part = re.fullmatch(r"part-(\d+)\..*", name)
        if part and int(part[1]) >= count:
            storage.remove(storage.join(_folder(store_dir), name))


def _read_counts(store_dir: str, part: int, digest: str) -> tuple[np.ndarray, np.ndarray]:
    path = _part_file(store_dir, part, ".counts.arrow")
    data = storage.read_bytes(path) if storage.exists(path) else b""
    if storage.digest_bytes(data) != digest:
        sidecar = _part_file(store_dir, part, ".json")
        raise UserError(f"{path}: is damaged or missing; delete {sidecar} and run again to make both anew")
    table = pa.ipc.open_file(data).read_all()
    return table["token"].to_numpy(), table["count"].to_numpy()


def file_digests(store_dir: str) -> dict[str, str]:
    """Path below the store -> digest, of every file of the finished sequences as its makers recorded it.

    Raises UserError where the index or a sidecar is damaged.
    """
    index = read_index(store_dir)
    if index is None:
        raise UserError(f"{_folder(store_dir)}: has no index.json")
    digests = {"sequences/token_counts.arrow": index.token_counts_digest}
    files = ["index.json"]
    for part, digest in enumerate(index.part_digests):
        sidecar = _read_sidecar(store_dir, part)
        if sidecar is None or sidecar["part_digest"] != digest:
            raise UserError(f"{_part_file(store_dir, part, '.json')}: is damaged; delete it and run again")
        files.append(f"part-{part:05d}.json")
        digests[f"sequences/part-{part:05d}.arrow"] = digest
        digests[f"sequences/part-{part:05d}.counts.arrow"] = sidecar["counts_digest"]
    for name in files:  # sealed, and found whole just now
        digests[f"sequences/{name}"] = storage.digest_file(storage.join(_folder(store_dir), name))
    return digests


def read_token_counts(store_dir: str) -> np.ndarray:
    """How often each id occurs in the corpus, special tokens 0: [V] int64. UserError where damaged."""
    index = read_index(store_dir)
    path = storage.join(_folder(store_dir), "token_counts.arrow")
    data = storage.read_bytes(path)
    if index is None or storage.digest_bytes(data) != index.token_counts_digest:
        raise UserError(f"{path}: does not match index.json; delete both and run again")
    counts: np.ndarray = pa.ipc.open_file(data).read_all()["count"].to_numpy()
    return counts


# Reading


class SequenceStore:
    """The finished sequences of a store, by permanent id; maps files as they are needed."""

    def __init__(self, store_dir: str, index: Index, cache: Cache | None) -> None:
        self.store_dir = store_dir
        self.index = index
        self._cache = cache
        self._starts = np.concatenate([[0], np.cumsum(index.part_sequences, dtype=np.int64)])
        self._part = lru_cache(OPEN_PARTS)(self._open_part)
        self._checked: set[int] = set()

    @property
    def count(self) -> int:
        return int(self._starts[-1])

    def rows(self, ids: range) -> tuple[np.ndarray, np.ndarray]:
        """input_ids [n, L] uint16|uint32 and token_count [n] uint16 of consecutive ids, read-only."""
        if not (ids.step == 1 and 0 <= ids.start <= ids.stop <= self.count):
            raise IndexError(f"{ids} is not a range of the {self.count} sequences of {self.store_dir}")
        first = int(np.searchsorted(self._starts, ids.start, side="right")) - 1
        inputs, counts = [], []
        at = ids.start
        for part in range(first, len(self.index.part_sequences)):
            if at >= ids.stop:
                break
            start, stop = int(self._starts[part]), int(self._starts[part + 1])
            table = self._part(part).slice(at - start, min(ids.stop, stop) - at)
            inputs += [chunk.flatten().to_numpy() for chunk in table["input_ids"].chunks]
            counts += [chunk.to_numpy() for chunk in table["token_count"].chunks]
            at = min(ids.stop, stop)
        if not inputs:
            dtype = np.uint16 if self.index.vocab_size <= 1 << 16 else np.uint32
            return np.empty((0, self.index.length), dtype), np.empty(0, np.uint16)
        return np.concatenate(inputs).reshape(-1, self.index.length), np.concatenate(counts)

    def _open_part(self, part: int) -> pa.Table:
        path, digest = _part_file(self.store_dir, part, ".arrow"), self.index.part_digests[part]
        damaged = UserError(f"{path}: is damaged or missing; delete it and run again to make it anew")
        if self._cache is not None:
            path = self._cache.local(path, digest)
        elif part not in self._checked:
            if not storage.exists(path) or storage.digest_file(path) != digest:
                raise damaged
            self._checked.add(part)
        return pa.ipc.open_file(pa.memory_map(path)).read_all()


def open_sequences(store_dir: str, cache: Cache | None = None) -> SequenceStore:
    """The finished sequences of a store; each file's digest is checked when it is first opened.

    A remote store needs a cache. UserError where ``finish_index`` has not run.
    """
    index = read_index(store_dir)
    if index is None:
        raise UserError(f"{_folder(store_dir)}: has no index.json; run the teacher stage on it first")
    return SequenceStore(store_dir, index, cache)
