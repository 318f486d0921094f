"""Documents become numbered sequences of L token ids, one Arrow file a part, in any order by any worker.

A part is tokenised, packed and published on its own (``build_part``); ``finish_index`` then numbers the
sequences of all parts in order and writes ``sequences/index.json``, last. Shapes: L length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from infra import storage
from infra.errors import UserError
from infra.sections import Corpus, Sequences
from offline_teacher.corpus import Part, documents, modified
from offline_teacher.corpus_problems import Problems
from offline_teacher.packing import Encoder, TextSeen, batched, load_encoder, pack
from offline_teacher.sequences import FORMAT_VERSION, Index, folder, part_file, read_index
from offline_teacher.store.sealed import seal, unseal

PARALLEL_READS = 16

# One part


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
    path = part_file(store_dir, index, ".json")
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
    path = part_file(store_dir, index, ".json")
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
    data = part_file(store_dir, index, ".arrow")
    if not storage.exists(data) or storage.size(data) != sidecar["bytes"]:
        return None
    return sidecar


def outstanding(store_dir: str, parts: Sequence[Part], corpus: Corpus, settings: Sequences) -> list[int]:
    """Indexes of the parts that ``build_part`` would have to build; reads sidecars only.

    Raises UserError where the store is finished and had another number of parts.
    """
    _refuse_other_number(store_dir, parts)
    encoder = load_encoder(storage.join(store_dir, "tokenizer"))
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        current = pool.map(
            lambda item: _current(store_dir, item[0], item[1], corpus, settings, encoder), enumerate(parts)
        )
        return [index for index, sidecar in enumerate(current) if sidecar is None]


def _refuse_other_number(store_dir: str, parts: Sequence[Part]) -> None:
    finished = read_index(store_dir)
    if finished is not None and len(finished.part_sequences) != len(parts):
        raise UserError(
            f"{store_dir}: was made of a corpus of {len(finished.part_sequences)} parts, this one has "
            f"{len(parts)}; restore the text, or make a new store"
        )


def refuse_other_text(store_dir: str, parts: Sequence[Part], corpus: Corpus, settings: Sequences) -> None:
    """UserError where the text is, by its parts and their sizes, not what the sequences were made of."""
    _refuse_other_number(store_dir, parts)
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
    with storage.publishing(part_file(store_dir, index, ".arrow")) as temporary:
        sidecar, token_counts = _write_part(temporary, part, corpus, settings, encoder)
        if finished is not None and finished.part_digests[index : index + 1] != [sidecar["part_digest"]]:
            files = " to ".join(sorted({part.spans[0].path, part.spans[-1].path}))
            raise UserError(
                f"{files}: part {index} of the corpus no longer gives the sequences that {store_dir} was "
                f"made of; restore the text, or make a new store"
            )
    counts = _sparse_counts(token_counts)
    storage.publish_bytes(part_file(store_dir, index, ".counts.arrow"), counts)
    sidecar["counts_digest"] = storage.digest_bytes(counts)
    sidecar["made_from"] = _made_from(part, corpus, settings, encoder)
    storage.publish_bytes(part_file(store_dir, index, ".json"), seal(sidecar))
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
                f"{folder(store_dir)}: {len(missing)} parts are missing, first {missing[0]}; run again"
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
    storage.publish_bytes(storage.join(folder(store_dir), "token_counts.arrow"), data)
    storage.publish_bytes(storage.join(folder(store_dir), "index.json"), seal(dataclasses.asdict(index)))
    return index


def _remove_parts_from(store_dir: str, count: int) -> None:
    """Those of an earlier attempt, which cut the text into more parts."""
    for name in storage.list_names(folder(store_dir)):
        part = re.fullmatch(r"part-(\d+)\..*", name)
        if part and int(part[1]) >= count:
            storage.remove(storage.join(folder(store_dir), name))


def _read_counts(store_dir: str, part: int, digest: str) -> tuple[np.ndarray, np.ndarray]:
    path = part_file(store_dir, part, ".counts.arrow")
    data = storage.read_bytes(path) if storage.exists(path) else b""
    if storage.digest_bytes(data) != digest:
        sidecar = part_file(store_dir, part, ".json")
        raise UserError(f"{path}: is damaged or missing; delete {sidecar} and run again to make both anew")
    table = pa.ipc.open_file(data).read_all()
    return table["token"].to_numpy(), table["count"].to_numpy()


def file_digests(store_dir: str) -> dict[str, str]:
    """Path below the store -> digest, of every file of the finished sequences as its makers recorded it.

    Raises UserError where the index or a sidecar is damaged.
    """
    index = read_index(store_dir)
    if index is None:
        raise UserError(f"{folder(store_dir)}: has no index.json")
    digests = {"sequences/token_counts.arrow": index.token_counts_digest}
    files = ["index.json"]
    for part, digest in enumerate(index.part_digests):
        sidecar = _read_sidecar(store_dir, part)
        if sidecar is None or sidecar["part_digest"] != digest:
            raise UserError(f"{part_file(store_dir, part, '.json')}: is damaged; delete it and run again")
        files.append(f"part-{part:05d}.json")
        digests[f"sequences/part-{part:05d}.arrow"] = digest
        digests[f"sequences/part-{part:05d}.counts.arrow"] = sidecar["counts_digest"]
    for name in files:  # sealed, and found whole just now
        digests[f"sequences/{name}"] = storage.digest_file(storage.join(folder(store_dir), name))
    return digests
