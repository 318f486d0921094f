"""A model directory, found or downloaded, and read: safetensors only, no code from it, an explicit class."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError, safe_open

from infra.errors import UserError, first_line
from infra.settings.sections import Teacher
from offline_teacher.families import family_of
from offline_teacher.families.family import Family

if TYPE_CHECKING:
    import torch

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
SIZE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
"""Fields of a configuration that must be integers of at least 1."""
UNUSED_WEIGHTS = ("pooler", "position_ids", "token_type_ids")
"""Weights and buffers of a model directory that are not loaded, because the encoder does not use them."""


def find_teacher(teacher: Teacher) -> str:
    """The local directory of the teacher; a hub name is downloaded (safetensors, config, tokenizer). Raises
    UserError where there is no such model, no safetensors weights, or no configuration."""
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


def read_config(directory: str) -> Any:
    """Returns a directory's configuration with the family's attention. Raises UserError if it is unreadable
    or of an unknown family, or if its values are invalid."""
    from transformers.activations import ACT2FN

    path = os.path.join(directory, "config.json")
    where = f"teacher.model: {path}"
    try:
        with open(path, encoding="utf-8") as stream:
            values = json.load(stream)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        family = family_of(values)
        config = family.config(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # the file may contain anything, and transformers raises many types of errors
        raise UserError(f"{where} cannot be read ({first_line(error)})") from None
    for name in SIZE_FIELDS:
        size = getattr(config, family.own_name(name))
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{where}: {name} is {size!r}, not an integer of at least 1")
    for name in ("hidden_act", "hidden_activation", "activation"):
        activation = getattr(config, name, None)
        if isinstance(activation, str) and activation not in ACT2FN:
            raise UserError(f"{where}: {name} {activation!r} is not an activation of transformers")
    if getattr(config, "is_decoder", False):
        raise UserError(f"{where}: is_decoder is true: the model attends to earlier tokens only")
    return config


def load_model(directory: str, config: Any = None) -> Any:
    """Returns the masked LM in float32 on the CPU, in evaluation mode.

    If the weights have no head, returns the encoder without a head. The weights decide whether decoder and
    word embeddings are tied: they are if both are equal, or if the file has only one of them. The model's
    ``config.tie_word_embeddings`` is set accordingly.

    Raises UserError if weights are missing, have other shapes than in ``config``, or would be ignored by
    transformers (such as those of further layers or of relative positions).
    """
    import torch
    from transformers.utils import logging

    config = read_config(directory) if config is None else family_of(config).config(config)
    family = family_of(config)
    config.tie_word_embeddings = True  # transformers then compares the weights, and ties only equal ones
    head = has_head(directory, config)
    model_class = family.model_class(head)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # suppresses its table of keys; _check_loading reports wrong ones
    try:
        model, info = model_class.from_pretrained(
            directory,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=family.attention,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # _check_loading refuses them, with their names
            output_loading_info=True,
            **family.class_arguments(head),
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"teacher.model: {directory} cannot be loaded ({first_line(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
    _check_loading(directory, family, info)
    if head:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.config.tie_word_embeddings = tied
    family.prepare(model)
    return model.eval()


def weight_files(directory: str) -> list[str]:
    """Returns the paths of the safetensors files. Raises UserError if none exists or the index is damaged."""
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
        raise UserError(f"teacher.model: {index} is not an index of weights ({first_line(error)})") from None
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or not name:
            raise UserError(f"teacher.model: {index} names {name!r}, which is not in the same directory")
    return [os.path.join(directory, name) for name in names]


@contextmanager
def open_weights(directory: str) -> Iterator[dict[str, Any]]:
    """Yields tensor name -> open safetensors file with this tensor. Raises UserError if a file is damaged."""
    with ExitStack() as files:
        file_of: dict[str, Any] = {}
        for path in weight_files(directory):
            try:
                weights = files.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                what = f"{path} is not a whole safetensors file ({first_line(error)})"
                raise UserError(f"teacher.model: {what}") from None
            file_of |= dict.fromkeys(weights.keys(), weights)
        yield file_of


def weight_digest(directory: str) -> str:
    """Returns an XXH3 digest of (name, dtype, shape, stored bytes) of all tensors, in the order of names. It
    does not depend on how the weights are split over files."""
    import torch

    hasher = xxhash.xxh3_128()
    with open_weights(directory) as weights:
        for name in sorted(weights):
            stored = weights[name].get_slice(name)
            hasher.update(json.dumps([name, stored.get_dtype(), stored.get_shape()]).encode())
            hasher.update(weights[name].get_tensor(name).reshape(-1).view(torch.uint8).numpy())
    return f"xxh3-128:{hasher.hexdigest()}"


def stored_dtype(directory: str) -> torch.dtype:
    """Returns the floating dtype of all weights of a directory, or float32 if they have several."""
    import torch

    with open_weights(directory) as weights:
        stored = {weights[name].get_slice(name).get_dtype() for name in weights}
    short = {"F16": torch.float16, "BF16": torch.bfloat16}
    floating = stored & {"F64", "F32", *short}
    return short.get(floating.pop(), torch.float32) if len(floating) == 1 else torch.float32


def has_head(directory: str, config: Any) -> bool:
    """Whether a directory's weights include a masked-LM head. Reads only the names of the tensors."""
    with open_weights(directory) as weights:
        return f"{family_of(config).head.dense}.weight" in weights


def pooler_weights(directory: str, config: Any) -> dict[str, torch.Tensor]:
    """Returns name in the masked LM -> tensor of the pooler; {} if the directory's weights have no pooler. No
    layer of an encoder needs the pooler, but fine-tuning on a task starts from it."""
    prefix = f"{family_of(config).prefix}."
    with open_weights(directory) as weights:
        names = [name for name in weights if "pooler" in name.split(".")]
        return {prefix + name.removeprefix(prefix): weights[name].get_tensor(name) for name in names}


def _check_loading(directory: str, family: Family, info: Any) -> None:
    """Raises UserError if weights of the encoder or the head are missing, unexpected or of a wrong shape."""
    encoder = (f"{family.prefix}.", "embeddings.", f"{family.layers}.")  # with the masked LM's prefix or not
    unexpected = [name for name in info["unexpected_keys"] if name.startswith(encoder)]
    unexpected = [name for name in unexpected if not any(part in name.split(".") for part in UNUSED_WEIGHTS)]
    decoder = family.head.decoder  # its bias is zero if it is absent
    biases = {f"{decoder}.bias", f"{decoder.rpartition('.')[0]}.bias"}
    missing = [name for name in info["missing_keys"] if name not in biases]
    mismatched = info["mismatched_keys"]
    misshapen = [f"{name} ({list(found)}, not {list(wanted)})" for name, found, wanted in mismatched]
    for names, meaning in (
        (misshapen, "has weights of other shapes than its config.json says"),
        (missing, "lacks weights of the model that its config.json describes"),
        (unexpected, "has weights that the model of its config.json has no place for"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"teacher.model: {directory} {meaning}: {', '.join(sorted(names)[:3])}{more}")
