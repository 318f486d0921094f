"""The teacher: a BERT-family masked LM, loaded as encoder + head."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infra.errors import UserError
from infra.sections import Teacher
from offline_teacher.store.head import MlmHead
from offline_teacher.teacher_directory import (
    HEADS,
    check_fit,
    find_teacher,
    first_line,
    load_config,
    load_tokenizer,
    tokenizer_digest,
    weight_digest,
)

UNUSED_WEIGHTS = ("pooler", "position_ids", "token_type_ids")
"""What a masked LM does without, of an encoder's weights and buffers."""
DECODER_BIAS = (
    "cls.predictions.bias",
    "cls.predictions.decoder.bias",
    "lm_head.bias",
    "lm_head.decoder.bias",
)
"""Where masked LMs keep it: in one place, or in two that are alike. In neither it is zero."""


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


def load_model(directory: str, config: Any) -> Any:
    """The masked LM in float32 on the CPU.

    The weights decide whether the decoder is the word embeddings: it is where they are equal or the file has
    one of the two. ``config.tie_word_embeddings`` is set to what they say.

    Raises UserError where weights are missing, have other shapes than ``config`` says, or are of an encoder
    that transformers would run without them (more layers, relative positions).
    """
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config.tie_word_embeddings = True  # transformers compares the weights then, and ties equal ones alone
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
        raise UserError(f"teacher.model: {directory} cannot be loaded ({first_line(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
    config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    encoder = f"{model.base_model_prefix}."
    unread = [name for name in info["unexpected_keys"] if name.startswith(encoder)]
    unread = [name for name in unread if not any(part in name.split(".") for part in UNUSED_WEIGHTS)]
    other = [
        f"{name} ({list(found)}, not {list(expected)})" for name, found, expected in info["mismatched_keys"]
    ]
    for names, meaning in (
        (other, "has weights of other shapes than its config.json says"),
        ([*set(info["missing_keys"]).difference(DECODER_BIAS)], "is not a masked LM; its weights lack"),
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
