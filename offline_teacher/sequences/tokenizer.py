"""A teacher's tokenizer: loaded and checked, its files, its digest, and what packing needs of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from infra import control_tokens
from infra.control_tokens import ControlIds
from infra.errors import UserError, first_line
from infra.files import storage

VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


def load_tokenizer(directory: str, name: str | None = None) -> Any:
    """The fast tokenizer in a local directory, which errors call ``name``. UserError if it cannot be used."""
    from transformers import AutoTokenizer

    where = name or f"teacher.model: {directory}"
    if not any(os.path.isfile(os.path.join(directory, file)) for file in VOCABULARY_FILES):
        raise UserError(f"{where} has no tokenizer ({' or '.join(VOCABULARY_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise UserError(f"{where} has no readable tokenizer ({first_line(error)})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{where}: the tokenizer has no tokenizer.json (a fast tokenizer)")
    for token in ("pad_token", "cls_token", "sep_token"):
        if getattr(tokenizer, token) is None:
            raise UserError(f"{where}: the tokenizer has no {token}; only BERT-like tokenizers can be used")
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """xxh3 over the fast tokenizer's JSON and the special ids, on which alone the token ids depend."""
    special = [
        tokenizer.mask_token_id,
        tokenizer.pad_token_id,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
    ]
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.update(truncation=None, padding=None)  # state of the last call, not part of the tokenizer
    text = json.dumps([content, special], sort_keys=True)
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(text.encode())}"


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files ``save_pretrained`` writes, without the keys that say where this copy was loaded from."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = {}
        for name in sorted(os.listdir(scratch)):
            with open(os.path.join(scratch, name), "rb") as stream:
                files[name] = stream.read()
    config = json.loads(files["tokenizer_config.json"])
    for key in ("local_files_only", "is_local", "name_or_path"):
        config.pop(key, None)
    files["tokenizer_config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return files


@dataclass(frozen=True)
class Encoder:
    """A fast tokenizer as packing needs it: text to bare ids, and the ids of the special tokens."""

    backend: Any
    cls_id: int
    sep_id: int
    pad_id: int
    unk_id: int | None
    control: ControlIds
    special_ids: tuple[int, ...]
    """Never masked, and never drawn in the place of a masked token; ids without a token are among them."""
    vocab_size: int
    """The largest id and one; the teacher may have more rows of embeddings."""
    digest: str

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the texts. They contain no control token except the unknown token, whatever the text
        is."""
        found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self.control.replace_in(encoding.ids) for encoding in found]

    def content(self) -> dict[str, Any]:
        """As in a tokenizer.json."""
        content: dict[str, Any] = json.loads(self.backend.to_str())
        return content


@lru_cache(maxsize=2)
def load_encoder(directory: str) -> Encoder:
    """The tokenizer saved in ``directory``, local or a URL. UserError if it cannot be used."""
    names = storage.list_names(directory)
    return encoder_of({name: storage.read_bytes(storage.join(directory, name)) for name in names}, directory)


def encoder_of(files: Mapping[str, bytes], where: str) -> Encoder:
    """The tokenizer of these files. ``where``: what errors call their directory."""
    digest = xxhash.xxh3_128()
    with tempfile.TemporaryDirectory() as local:
        for name, data in files.items():
            Path(local, name).write_bytes(data)
            digest.update(f"{name}:{len(data)}:".encode() + data)
        tokenizer = load_tokenizer(local, where)
    control_tokens.read_as_text(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    tokens = tokenizer.get_vocab().values()
    vocab_size = max(tokens) + 1
    gaps = set(range(vocab_size)).difference(tokens)
    return Encoder(
        backend=backend,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        pad_id=tokenizer.pad_token_id,
        unk_id=tokenizer.unk_token_id,
        control=ControlIds.of(tokenizer),
        special_ids=tuple(sorted(gaps.union(tokenizer.all_special_ids))),
        vocab_size=vocab_size,
        digest=f"xxh3-128:{digest.hexdigest()}",
    )
