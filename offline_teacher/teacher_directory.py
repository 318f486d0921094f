"""A teacher's directory: found or downloaded, and checked without loading its weights."""

from __future__ import annotations

import os
from typing import Any

from infra.errors import UserError, first_line
from infra.settings.sections import Teacher
from offline_teacher.families.positions import usable_length
from offline_teacher.models.loading import weight_files

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


def find_teacher(teacher: Teacher) -> str:
    """The local directory of the teacher; a hub name is downloaded (safetensors, config, tokenizer).

    Raises UserError where there is no such model, no safetensors weights, or no configuration.
    """
    directory = teacher.model if os.path.isdir(teacher.model) else _download(teacher)
    if not os.path.isfile(os.path.join(directory, "config.json")):
        raise UserError(f"teacher.model: {teacher.model} has no config.json; is it a model directory?")
    weight_files(directory)
    return os.path.abspath(directory)


def _download(teacher: Teacher) -> str:
    from huggingface_hub import snapshot_download

    if teacher.model.startswith((".", "/", "~")) or teacher.model.count("/") > 1:
        raise UserError(f"teacher.model: there is no directory {teacher.model}")
    try:
        return snapshot_download(teacher.model, revision=teacher.revision, allow_patterns=list(HUB_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types
        cause = error.__cause__ or error  # of "not in the cache" it is the hub's answer
        raise UserError(
            f"teacher.model: {teacher.model} is neither a local directory nor a model of the hub"
            f" ({type(cause).__name__}: {first_line(cause)}); give a directory, or a hub name and network"
            " access"
        ) from None


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
