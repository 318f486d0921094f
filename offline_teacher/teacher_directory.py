"""A teacher's directory: found or downloaded, and checked without loading its weights."""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from typing import TYPE_CHECKING, Any

import xxhash

from infra.errors import UserError
from infra.settings.sections import Teacher
from offline_teacher.families.positions import usable_length

if TYPE_CHECKING:
    from offline_teacher.models.pooling import Pooling

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
HUB_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "*_Pooling/config.json",
    "*token*",
    "vocab.*",
    "merges.txt",
)
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


def find_teacher(teacher: Teacher) -> str:
    """The local directory of the teacher; a hub name is downloaded (safetensors, config, tokenizer).

    Raises UserError where there is no such model, no safetensors weights, or no configuration.
    """
    directory = teacher.model if os.path.isdir(teacher.model) else _download(teacher)
    if not os.path.isfile(os.path.join(directory, "config.json")):
        raise UserError(f"teacher.model: {teacher.model} has no config.json; is it a model directory?")
    _weight_files(directory)
    return os.path.abspath(directory)


def _download(teacher: Teacher) -> str:
    from huggingface_hub import snapshot_download

    if teacher.model.startswith((".", "/", "~")) or teacher.model.count("/") > 1:
        raise UserError(f"teacher.model: there is no directory {teacher.model}")
    try:
        return snapshot_download(teacher.model, revision=teacher.revision, allow_patterns=list(HUB_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types
        cause = error.__cause__ or error  # of "not in the cache" it is the hub's answer
        answer = str(cause).strip().partition("\n")[0][:200]
        raise UserError(
            f"teacher.model: {teacher.model} is neither a local directory nor a model of the hub"
            f" ({type(cause).__name__}: {answer}); give a directory, or a hub name and network access"
        ) from None


def _weight_files(directory: str) -> list[str]:
    single = os.path.join(directory, "model.safetensors")
    if os.path.isfile(single):
        return [single]
    index = os.path.join(directory, "model.safetensors.index.json")
    if not os.path.isfile(index):
        raise UserError(
            f"teacher.model: {directory} has no weights (model.safetensors); other formats are not read,"
            " save the model again with save_pretrained(..., safe_serialization=True)"
        )
    try:
        with open(index, encoding="utf-8") as stream:
            names = sorted(set(json.load(stream)["weight_map"].values()))
        if not names:
            raise ValueError("it names no weights")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"teacher.model: {index} is no index of weights ({first_line(error)})") from None
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or not name:
            raise UserError(f"teacher.model: {index} names {name!r}, which is not in the same directory")
    return [os.path.join(directory, name) for name in names]


def weight_digest(directory: str) -> str:
    """xxh3 over (name, dtype, shape, bytes as stored) of every tensor in the order of names.

    Tensors, not files: the same weights split over other files have the same digest.
    """
    tensors = {}
    for path in _weight_files(directory):
        try:
            with open(path, "rb") as stream:
                view = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            (header_bytes,) = struct.unpack("<Q", view[:8])
            header = json.loads(bytes(view[8 : 8 + header_bytes]))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
                if not 8 + header_bytes <= start <= stop <= len(view):
                    raise ValueError("cut off")
                tensors[name] = (entry["dtype"], entry["shape"], view[start:stop])
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            struct.error,
        ) as error:
            raise UserError(
                f"teacher.model: {path} is not a whole safetensors file ({first_line(error)})"
            ) from None
    hasher = xxhash.xxh3_128()
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        hasher.update(json.dumps([name, dtype, shape]).encode())
        hasher.update(data)
    return f"xxh3-128:{hasher.hexdigest()}"


def load_config(directory: str) -> Any:
    """The configuration. For an unsupported family it raises UserError, which names the supported ones."""
    from transformers.activations import ACT2FN

    from offline_teacher.models.loading import read_config

    config = read_config(directory)
    file = f"teacher.model: {directory}/config.json"
    for name in SIZES:
        size = getattr(config, name)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{file}: {name} is {size!r}, not a number of at least 1")
    for name in ("hidden_act", "hidden_activation", "activation"):
        activation = getattr(config, name, None)
        if isinstance(activation, str) and activation not in ACT2FN:
            raise UserError(f"{file}: {name} {activation!r} is not an activation of transformers")
    if getattr(config, "is_decoder", False):
        raise UserError(f"{file}: is_decoder is true: the model attends to earlier tokens only")
    return config


def has_masked_lm_head(directory: str, config: Any) -> bool:
    """Whether the weights have a masked-LM head; they are not loaded."""
    from offline_teacher.models.loading import has_head

    return has_head(directory, config)


def read_pooling_of(directory: str) -> Pooling | None:
    """How a sentence encoder makes one vector of a text; None for other models."""
    from offline_teacher.models.pooling import read_pooling

    if not os.path.isfile(os.path.join(directory, "modules.json")):
        return None
    return read_pooling(directory)


def load_tokenizer(directory: str) -> Any:
    """The fast tokenizer beside the weights. Raises UserError if there is none, or it cannot mask and pad."""
    from transformers import AutoTokenizer

    if not any(os.path.isfile(os.path.join(directory, name)) for name in VOCABULARY_FILES):
        raise UserError(f"teacher.model: {directory} has no tokenizer ({' or '.join(VOCABULARY_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise UserError(
            f"teacher.model: {directory} has no readable tokenizer ({first_line(error)})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"teacher.model: the tokenizer of {directory} has no tokenizer.json (a fast tokenizer)"
        )
    for name in ("pad_token", "cls_token", "sep_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"teacher.model: the tokenizer of {directory} has no {name}")
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


def check_fit(directory: str, config: Any, tokenizer: Any, length: int) -> None:
    """UserError unless tokenizer, model and sequence length belong together."""
    name, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= config.vocab_size:  # rows without a token are no reason: many models have some
        raise UserError(
            f"teacher.model: the tokenizer of {directory} has the token {name!r} with id {largest}, its model"
            f" only {config.vocab_size} rows of embeddings: they are not of the same vocabulary"
        )
    if config.pad_token_id is not None and config.pad_token_id != tokenizer.pad_token_id:
        raise UserError(
            f"teacher.model: the tokenizer of {directory} pads with id {tokenizer.pad_token_id}, its model"
            f" expects {config.pad_token_id}: they are not of the same vocabulary"
        )
    positions = usable_length(config)
    if length > positions:
        raise UserError(f"sequences.length: {length} is more than the {positions} positions of {directory}")


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
