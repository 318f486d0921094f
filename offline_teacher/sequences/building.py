"""Documents become sequences of L token ids, one Arrow file a part, in any order by any worker.

A part is tokenised, packed and published on its own; its rows are numbered (part, row), so nothing waits for
the other parts. Shapes: n rows, L length, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import UserError
from infra.files import storage
from infra.files.cache import Cache
from infra.settings.recipe import outcome_settings
from infra.settings.sections import Corpus, Sequences
from offline_teacher.corpus.documents import Part, documents, modified
from offline_teacher.corpus.problems import Problems
from offline_teacher.sequences.packing import Encoder, TextSeen, batched, load_encoder, pack
from offline_teacher.store.index import PartIndex
from offline_teacher.store.manifest import SEQUENCES, part_name, part_path
from offline_teacher.store.parts import publish_part, read_counts
from offline_teacher.store.pending import finished_tasks, in_order, read_part_index, read_parts
from offline_teacher.store.schema import SPLITS, Layout

COUNTS_END = ".counts.arrow"
VERSION = 3
"""Version of the way text becomes sequences. Parts of another version are built again."""


@dataclass(frozen=True)
class Tokenising:
    """How the text of a store becomes sequences."""

    corpus: Corpus
    sequences: Sequences
    prompt: str = ""
    """The prompt before every text."""
    counted: bool = False
    """Whether to count tokens, because masking is by frequency."""


def text_digest(parts: Sequence[Part]) -> str:
    """Digest of how the text is cut into parts and of the sizes of its files, not of their names."""
    cut = [[part.split, [(span.start, span.stop, span.stamp) for span in part.spans]] for part in parts]
    return storage.digest_bytes(json.dumps(cut).encode())


def outstanding(root: str, split: str, parts: Sequence[Part], how: Tokenising) -> list[int]:
    """The parts that ``build_part`` would have to build; reads their indices only."""
    encoder = load_encoder(storage.join(root, "tokenizer"))
    sizes = storage.list_sizes(storage.join(root, SEQUENCES, split))

    def is_left(number: int) -> bool:
        return _current(root, split, number, parts[number], how, encoder, sizes) is None

    left = in_order(is_left, range(len(parts)))
    return [number for number, missing in enumerate(left) if missing]


def build_part(
    root: str,
    layout: Layout,
    split: str,
    number: int,
    part: Part,
    how: Tokenising,
) -> PartIndex:
    """Publishes the sequences of a part, unless they are there; its index.

    Uses the tokenizer in the store and depends on its arguments alone. UserError where tasks of the store
    were made of other text.
    """
    encoder = load_encoder(storage.join(root, "tokenizer"))
    names = [os.path.basename(part_path(root, split, number, end)) for end in (".json", ".arrow", COUNTS_END)]
    places = {name: storage.join(root, SEQUENCES, split, name) for name in names}
    sizes = {name: storage.size(path) for name, path in places.items() if storage.exists(path)}
    found = _current(root, split, number, part, how, encoder, sizes)
    if found is not None:
        return found
    problems, text = Problems(how.corpus.strict), TextSeen()
    texts = (how.prompt + document for document in documents(part, how.corpus, problems))
    rows = list(pack(batched(texts, text), encoder, how.sequences, text))
    problems.cut_documents, problems.cut_tokens = text.cut_documents, text.cut_tokens
    digest = f"xxh3-128:{text.digest.hexdigest()}"
    _refuse_other_digest(root, split, number, digest)
    columns = {
        "input_ids": np.concatenate([ids for ids, _ in rows] or [np.empty((0, how.sequences.length))]),
        "token_count": np.concatenate([count for _, count in rows] or [np.empty(0, np.uint16)]),
    }
    columns["input_ids"] = columns["input_ids"].astype(layout.id_dtype, copy=False)
    facts: dict[str, Any] = {
        "text": digest,
        "made_from": _made_from(part, how, encoder),
        "documents": text.documents,
        "text_bytes": text.text_bytes,
        "problems": problems.to_json(),
    }
    counts = _counts(columns["input_ids"], encoder) if how.counted else None
    return publish_part(root, layout, split, number, columns, facts, counts)


def refuse_other_text(root: str, split: str, number: int, part: Part, how: Tokenising) -> None:
    """Raises UserError if tasks of the store were made from other text than the corpus now has; reads one
    part."""
    text = TextSeen()
    for document in documents(part, how.corpus, Problems(strict=False)):
        text.add(how.prompt + document)
    _refuse_other_digest(root, split, number, f"xxh3-128:{text.digest.hexdigest()}")


def _refuse_other_digest(root: str, split: str, number: int, digest: str) -> None:
    try:
        found, _ = read_part_index(root, split, number)
    except UserError:  # absent or damaged
        return
    if found.text != digest and any(finished_tasks(root, name) for name in SPLITS):
        raise UserError(
            f"corpus: part {number} of the {split} text in {root} was made of other text, which has changed"
            " since: restore it, or choose another store.path"
        )


def _counts(input_ids: np.ndarray, encoder: Encoder) -> dict[str, np.ndarray]:
    """How often each id occurs, special tokens left out."""
    count = np.bincount(input_ids.ravel().astype(np.int64), minlength=encoder.vocab_size)
    count[list(encoder.special_ids)] = 0
    (token,) = np.nonzero(count)
    return {"token": token.astype(np.uint32), "count": count[token].astype(np.int64)}


def token_counts(root: str, split: str, parts: int, vocab_size: int, cache: Cache) -> np.ndarray:
    """How often each id occurs in all parts of a split, special tokens 0: int64 [V]."""
    total = np.zeros(vocab_size, np.int64)
    for index, _ in read_parts(root, split, parts):
        counts = read_counts(root, index, cache)
        total[counts["token"]] += counts["count"]
    return total


def rows_of(root: str, split: str, parts: int) -> tuple[int, ...]:
    """The number of rows of each part. UserError where no part has any."""
    found = list(read_parts(root, split, parts))
    if not any(index.rows for index, _ in found):
        problems = Problems.merged(dict(index.problems) for index, _ in found).summary()
        raise UserError(
            f"the corpus has no usable document{': ' + problems if problems else ', its files are empty'}"
        )
    return tuple(index.rows for index, _ in found)


def problems_of(root: str, split: str, parts: int) -> str:
    """The problems of a split's text as a sentence; empty if there are none."""
    return Problems.merged(dict(index.problems) for index, _ in read_parts(root, split, parts)).summary()


def _made_from(part: Part, how: Tokenising, encoder: Encoder) -> str:
    """Digest of all that decides a part's content except the bytes of its files, and not of their names."""
    recipe = [outcome_settings(section) for section in (how.corpus, how.sequences)]
    spans = [(span.start, span.stop, span.stamp) for span in part.spans]
    content = [VERSION, recipe, part.split, spans, encoder.digest]
    return storage.digest_bytes(json.dumps(content, sort_keys=True).encode())


def _current(
    root: str,
    split: str,
    number: int,
    part: Part,
    how: Tokenising,
    encoder: Encoder,
    sizes: Mapping[str, int],
) -> PartIndex | None:
    """The index of a part that need not be built again. ``sizes``: file name -> bytes, of what is there.

    Its recipe and sizes are compared, and, as make does, that no local file of it was written after it.
    """
    name, path = part_name(number), part_path(root, split, number, ".json")
    if f"{name}.json" not in sizes:
        return None
    try:
        index, _ = read_part_index(root, split, number)
    except UserError:  # damaged: it is built again
        return None
    if index.made_from != _made_from(part, how, encoder):
        return None
    if how.corpus.strict and index.problems["counts"]:  # found when it was not strict: to be refused now
        return None
    if sizes.get(f"{name}.arrow") != index.bytes:
        return None
    if index.counts is not None and f"{name}{COUNTS_END}" not in sizes:
        return None
    if not storage.is_remote(path) and modified(part) >= os.stat(path).st_mtime:
        return None
    return index
