"""The teacher: a BERT-family masked LM, found, checked and loaded as encoder + head."""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from infra.errors import UserError
from infra.sections import Teacher
from offline_teacher.store.head import MlmHead

HEADS = {
    "bert": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
    ),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    "xlm-roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    "camembert": ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
}
"""model_type -> where the masked-LM head keeps dense, layer norm and decoder."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
UNUSED_WEIGHTS = ("pooler", "position_ids", "token_type_ids")
"""What a masked LM does without, of an encoder's weights and buffers."""
HUB_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "*token*",
    "vocab.*",
    "merges.txt",
)
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
VOCABULARY_PADDING = 128
"""A model may have fewer than this many rows more than its tokenizer has tokens (rounding up)."""


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher ready to run. ``model`` is the encoder alone, in the recipe's dtype, on ``device``."""

    model: nn.Module
    tokenizer: Any
    head: MlmHead
    config: dict[str, Any]
    weight_digest: str
    tokenizer_digest: str
    device: torch.device
    dtype: torch.dtype


# Finding and checking, without loading the weights


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
        raise UserError(
            f"teacher.model: {teacher.model} is neither a local directory nor a model the hub gives us"
            f" ({type(error).__name__}); give a directory, or a hub name and network access"
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
        raise UserError(f"teacher.model: {index} is no index of weights ({_first_line(error)})") from None
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or not name:
            raise UserError(f"teacher.model: {index} names {name!r}, which is no file of its own directory")
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
                f"teacher.model: {path} is not a whole safetensors file ({_first_line(error)})"
            ) from None
    hasher = xxhash.xxh3_128()
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        hasher.update(json.dumps([name, dtype, shape]).encode())
        hasher.update(data)
    return f"xxh3-128:{hasher.hexdigest()}"


def load_config(directory: str) -> Any:
    """The configuration; UserError, naming the supported families, where it is of another."""
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    file = f"teacher.model: {directory}/config.json"
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a file of anything at all: transformers raises what its parts raise
        raise UserError(f"{file} cannot be read ({_first_line(error)})") from None
    if config.model_type not in HEADS:
        raise UserError(
            f"teacher.model: {directory} is a {config.model_type!r} model; supported are masked LMs of the"
            f" families {', '.join(HEADS)}"
        )
    for name in SIZES:
        size = getattr(config, name)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{file}: {name} is {size!r}, not a number of at least 1")
    if config.hidden_act not in ACT2FN:
        raise UserError(f"{file}: hidden_act {config.hidden_act!r} is not an activation transformers has")
    if config.is_decoder:
        raise UserError(f"{file}: is_decoder is true: the model looks at the tokens before one alone")
    return config


def load_tokenizer(directory: str) -> Any:
    """The fast tokenizer beside the weights; UserError where there is none or it cannot mask and pad."""
    from transformers import AutoTokenizer

    if not any(os.path.isfile(os.path.join(directory, name)) for name in VOCABULARY_FILES):
        raise UserError(f"teacher.model: {directory} has no tokenizer ({' or '.join(VOCABULARY_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise UserError(
            f"teacher.model: {directory} has no readable tokenizer ({_first_line(error)})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"teacher.model: the tokenizer of {directory} has no tokenizer.json (a fast tokenizer)"
        )
    for name in ("mask_token", "pad_token", "cls_token", "sep_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"teacher.model: the tokenizer of {directory} has no {name}")
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """xxh3 over the fast tokenizer's JSON and the special ids: what decides the ids, and nothing else."""
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
    tokens, rows = len(tokenizer), config.vocab_size
    if tokens > rows or rows - tokens >= VOCABULARY_PADDING:
        raise UserError(
            f"teacher.model: the tokenizer of {directory} has {tokens} tokens, its model {rows}:"
            " they are not of the same vocabulary"
        )
    if config.pad_token_id is not None and config.pad_token_id != tokenizer.pad_token_id:
        raise UserError(
            f"teacher.model: the tokenizer of {directory} pads with id {tokenizer.pad_token_id}, its model"
            f" expects {config.pad_token_id}: they are not of the same vocabulary"
        )
    positions = config.max_position_embeddings
    if config.model_type != "bert":  # RoBERTa counts positions from pad_token_id + 1
        if config.pad_token_id is None:
            raise UserError(f"teacher.model: {directory}/config.json has no pad_token_id")
        positions -= config.pad_token_id + 1
    if length > positions:
        raise UserError(f"sequences.length: {length} is more than the {positions} positions of {directory}")


# Loading


def load_model(directory: str, config: Any) -> Any:
    """The masked LM in float32 on the CPU.

    Raises UserError where weights are missing, have other shapes than ``config`` says, or are of an encoder
    that transformers would run without them (more layers, relative positions).
    """
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of keys: what matters of it is said below
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            directory,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"teacher.model: {directory} cannot be loaded ({_first_line(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
    encoder = f"{model.base_model_prefix}."
    unread = [name for name in info["unexpected_keys"] if name.startswith(encoder)]
    unread = [name for name in unread if not any(part in name.split(".") for part in UNUSED_WEIGHTS)]
    other = [
        f"{name} ({list(found)}, not {list(expected)})" for name, found, expected in info["mismatched_keys"]
    ]
    for names, meaning in (
        (other, "has weights of other shapes than its config.json says"),
        (list(info["missing_keys"]), "is not a masked LM; its weights lack"),
        (unread, "has weights that the model of its config.json has no place for"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"teacher.model: {directory} {meaning}: {', '.join(sorted(names)[:3])}{more}")
    return model


def load_teacher(teacher: Teacher, device: str | torch.device, length: int = 8) -> LoadedTeacher:
    """The teacher in the recipe's dtype on ``device``, checked against sequences of ``length``.

    Raises UserError where the directory has no weights, no masked-LM head, another family, or a
    tokenizer of another vocabulary.
    """
    directory = find_teacher(teacher)
    config, tokenizer = load_config(directory), load_tokenizer(directory)
    check_fit(directory, config, tokenizer, length)
    digest = weight_digest(directory)
    model = load_model(directory, config)
    dtype = getattr(torch, teacher.dtype)
    head = mlm_head(model)
    encoder = model.base_model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return LoadedTeacher(
        model=encoder,
        tokenizer=tokenizer,
        head=head,
        config=json.loads(config.to_json_string(use_diff=False)),
        weight_digest=digest,
        tokenizer_digest=tokenizer_digest(tokenizer),
        device=torch.device(device),
        dtype=dtype,
    )


def mlm_head(model: Any) -> MlmHead:
    """The masked-LM head as float32 arrays; one arithmetic for all families (see `MlmHead`)."""
    dense, norm, decoder = (model.get_submodule(name) for name in HEADS[model.config.model_type])

    def array(tensor: Tensor) -> np.ndarray:
        return np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())

    return MlmHead(
        dense_weight=array(dense.weight),
        dense_bias=array(dense.bias),
        layer_norm_weight=array(norm.weight),
        layer_norm_bias=array(norm.bias),
        decoder_weight=array(decoder.weight),
        decoder_bias=array(decoder.bias),
        # RoBERTa's head is always gelu, whatever the encoder's activation
        hidden_act=model.config.hidden_act if model.config.model_type == "bert" else "gelu",
        layer_norm_eps=float(norm.eps),
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
