"""A model directory read from disk: safetensors only, no code from the directory, an explicit class."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from infra.errors import UserError
from offline_teacher.families import family_of
from offline_teacher.families.family import Family

UNUSED_WEIGHTS = ("pooler", "position_ids", "token_type_ids")
"""Weights and buffers of a model directory that are not loaded, because the encoder does not use them."""


def read_config(directory: str) -> Any:
    """The configuration with the family's attention. UserError if it is unreadable or of an unknown
    family."""
    path = os.path.join(directory, "config.json")
    try:
        with open(path, encoding="utf-8") as stream:
            values = json.load(stream)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        family = family_of(values)
        return family.config(values)
    except UserError as error:
        raise UserError(f"teacher.model: {path}: {error}") from None
    except Exception as error:  # a file of anything at all: transformers raises what its parts raise
        raise UserError(f"teacher.model: {path} cannot be read ({_first_line(error)})") from None


def load_model(directory: str, config: Any = None) -> Any:
    """The masked LM in float32 on the CPU, in evaluation mode; the encoder alone if the weights have no head.

    The weights decide whether decoder and word embeddings are tied: they are if both are equal, or if the
    file has only one of them. The model's ``config.tie_word_embeddings`` is set accordingly.

    Raises UserError if weights are missing, differ in shape from ``config``, or are weights that transformers
    would ignore (of more layers, of relative positions).
    """
    from transformers.utils import logging

    config = read_config(directory) if config is None else family_of(config).config(config)
    family = family_of(config)
    config.tie_word_embeddings = True  # transformers compares the weights then, and ties equal ones alone
    head = has_head(directory, config)
    model_class = family.model_class(head)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of keys: what matters of it is said below
    try:
        model, info = model_class.from_pretrained(
            directory,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=family.attention,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **family.class_arguments(head),
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"teacher.model: {directory} cannot be loaded ({_first_line(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
    _check_loading(directory, family, info)
    if head:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.config.tie_word_embeddings = tied
    family.prepare(model)
    return model.eval()


def stored_dtype(directory: str) -> torch.dtype:
    """The floating dtype that all of a directory's weights have; float32 where they have several."""
    found = set()
    for path in _weight_paths(directory):
        with safe_open(path, framework="pt") as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    known = {"F16": torch.float16, "BF16": torch.bfloat16}
    floating = found & {"F64", "F32", "F16", "BF16"}
    return known.get(floating.pop(), torch.float32) if len(floating) == 1 else torch.float32


def has_head(directory: str, config: Any) -> bool:
    """Whether a directory's weights have a masked-LM head; the weights are not loaded."""
    return f"{family_of(config).head.dense}.weight" in _weight_names(directory)


def pooler_weights(directory: str, config: Any) -> dict[str, torch.Tensor]:
    """A pooler's tensors, by the masked LM's names; {} where the directory's weights have none.

    No layer of an encoder needs them; fine-tuning on a task starts from them.
    """
    prefix, found = f"{family_of(config).prefix}.", {}
    for path in _weight_paths(directory):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if "pooler" in name.split("."):
                    found[prefix + name.removeprefix(prefix)] = weights.get_tensor(name)
    return found


def _weight_paths(directory: str) -> list[str]:
    single = os.path.join(directory, "model.safetensors")
    if os.path.isfile(single):
        return [single]
    with open(f"{single}.index.json", encoding="utf-8") as stream:
        names = set(json.load(stream)["weight_map"].values())
    return [os.path.join(directory, name) for name in sorted(names)]


def _check_loading(directory: str, family: Family, info: Any) -> None:
    """Raises UserError if weights of the encoder or the head are missing, unexpected or of a wrong shape."""
    encoder = (f"{family.prefix}.", "embeddings.", f"{family.layers}.")  # with the masked LM's prefix or not
    unread = [name for name in info["unexpected_keys"] if name.startswith(encoder)]
    unread = [name for name in unread if not any(part in name.split(".") for part in UNUSED_WEIGHTS)]
    other = [
        f"{name} ({list(found)}, not {list(expected)})" for name, found, expected in info["mismatched_keys"]
    ]
    for names, meaning in (
        (other, "has weights of other shapes than its config.json says"),
        (_lost(family, info), "lacks weights of the model that its config.json describes"),
        (unread, "has weights that the model of its config.json has no place for"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"teacher.model: {directory} {meaning}: {', '.join(sorted(names)[:3])}{more}")


def _lost(family: Family, info: Any) -> list[str]:
    """Weights that are missing. A decoder's bias may lie in one of two places; in neither it is zero."""
    decoder = family.head.decoder
    biases = {f"{decoder}.bias", f"{decoder.rpartition('.')[0]}.bias"}
    return [name for name in info["missing_keys"] if name not in biases]


def _weight_names(directory: str) -> set[str]:
    """Names of all tensors in a directory's safetensors file, or in those that its index names."""
    single = os.path.join(directory, "model.safetensors")
    try:
        if os.path.isfile(single):
            with safe_open(single, framework="pt") as weights:
                return set(weights.keys())
        with open(f"{single}.index.json", encoding="utf-8") as stream:
            return set(json.load(stream)["weight_map"])
    except FileNotFoundError:
        raise UserError(
            f"teacher.model: {directory} has no weights (model.safetensors); other formats are not read,"
            " save the model again with save_pretrained"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"teacher.model: {directory}: weights cannot be read ({_first_line(error)})"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
