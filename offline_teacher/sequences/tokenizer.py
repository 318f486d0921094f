"""Loads and checks a teacher's tokenizer, and encodes texts with it."""

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
    """Returns the fast tokenizer in a local directory. Raises UserError if it cannot be used. ``name`` is
    what error messages call the directory; by default its path."""
    from transformers import AutoTokenizer

    where = name or f"teacher.model: {directory}"
    if not any(os.path.isfile(os.path.join(directory, file)) for file in VOCABULARY_FILES):
        raise UserError(f"{where} has no tokenizer ({' or '.join(VOCABULARY_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise UserError(f"{where} has no readable tokenizer ({first_line(error)})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{where}: the tokenizer is not a fast one: it has no tokenizer.json")
    for token in ("pad_token", "cls_token", "sep_token"):
        if getattr(tokenizer, token) is None:
            raise UserError(f"{where}: the tokenizer has no {token}; only BERT-like tokenizers can be used")
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns an XXH3 digest of all that token ids depend on: the tokenizer's JSON and the special ids."""
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "cls", "sep")]
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.update(truncation=None, padding=None)  # these are arguments of the last call
    text = json.dumps([content, special], sort_keys=True)
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(text.encode())}"


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Returns name -> content of what ``save_pretrained`` writes, without keys about where it came from."""
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
    """A fast tokenizer that adds no special tokens, and the ids of the special tokens."""

    backend: Any
    cls_id: int
    sep_id: int
    pad_id: int
    unk_id: int | None
    control: ControlIds
    special_ids: tuple[int, ...]
    """Ids that are never masked and never replace a masked token: special tokens, and ids without a token."""
    vocab_size: int
    """Largest id + 1; the teacher may have more rows of embeddings."""
    digest: str
    """XXH3 digest of the tokenizer's files."""

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text. The only control token in them is the unknown token, even if a
        text contains names of control tokens."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self.control.replace_in(encoding.ids) for encoding in encodings]

    def content(self) -> Any:
        """Returns the tokenizer as the JSON object that a tokenizer.json has."""
        return json.loads(self.backend.to_str())


@lru_cache(maxsize=2)
def load_encoder(directory: str) -> Encoder:
    """Loads the tokenizer in ``directory``, a path or URL. Raises UserError if it cannot be used."""
    names = storage.list_names(directory)
    return encoder_of({name: storage.read_bytes(storage.join(directory, name)) for name in names}, directory)


def encoder_of(files: Mapping[str, bytes], where: str) -> Encoder:
    """Loads a tokenizer from its files, name -> content. ``where``: the directory in error messages."""
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
