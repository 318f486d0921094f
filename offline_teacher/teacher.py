"""The teacher: a BERT-family masked LM as encoder + head, and what the store keeps of its output.

Axes: B batch, L length, M masked positions a sequence, P recorded positions a sequence (L or M),
N recorded positions of a batch (padding left out), K top-k, T temperatures, V vocabulary, D hidden.
"""

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
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from infra.errors import UserError
from infra.sections import Teacher
from offline_teacher.reduction import ColumnOrder, reduce_logits
from offline_teacher.store.head import MlmHead
from offline_teacher.store.quantise import quantise
from offline_teacher.store.schema import Layout

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
MATMUL_POSITIONS = {"cpu": 256, "cuda": 8192}
"""Positions whose logits exist at once: enough for the matrix product to be efficient."""
REDUCE_POSITIONS = {"cpu": 32, "cuda": 8192}
"""Positions reduced at once: on a CPU their float32 logits stay in the cache."""


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
                if stop > len(view):
                    raise ValueError("cut off")
                tensors[name] = (entry["dtype"], entry["shape"], view[start:stop])
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise UserError(f"teacher.model: {path} is not a whole safetensors file ({error})") from None
    hasher = xxhash.xxh3_128()
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        hasher.update(json.dumps([name, dtype, shape]).encode())
        hasher.update(data)
    return f"xxh3-128:{hasher.hexdigest()}"


def load_config(directory: str) -> Any:
    """The configuration; UserError, naming the supported families, where it is of another."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"teacher.model: {directory}/config.json cannot be read ({_first_line(error)})"
        ) from None
    if config.model_type not in HEADS:
        raise UserError(
            f"teacher.model: {directory} is a {config.model_type!r} model; supported are masked LMs of the"
            f" families {', '.join(HEADS)}"
        )
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
        positions -= config.pad_token_id + 1
    if length > positions:
        raise UserError(f"sequences.length: {length} is more than the {positions} positions of {directory}")


# Loading


def load_teacher(teacher: Teacher, device: str | torch.device, length: int = 8) -> LoadedTeacher:
    """The teacher in the recipe's dtype on ``device``, checked against sequences of ``length``.

    Raises UserError where the directory has no weights, no masked-LM head, another family, or a
    tokenizer of another vocabulary.
    """
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    directory = find_teacher(teacher)
    config, tokenizer = load_config(directory), load_tokenizer(directory)
    check_fit(directory, config, tokenizer, length)
    digest = weight_digest(directory)
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            directory,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"teacher.model: {directory} cannot be loaded ({_first_line(error)})") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"teacher.model: {directory} is not a masked LM: its weights lack {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )
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


# Running


class _Head:
    """The masked-LM head on the teacher's device, and the reduction of its logits."""

    def __init__(self, loaded: LoadedTeacher, layout: Layout) -> None:
        from transformers.activations import ACT2FN

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(loaded.device, loaded.dtype)

        head = loaded.head
        self.layout, self.eps, self.act = layout, head.layer_norm_eps, ACT2FN[head.hidden_act]
        self.order = ColumnOrder(layout.vocab_size)
        self.dense = tensor(head.dense_weight), tensor(head.dense_bias)
        self.norm = tensor(head.layer_norm_weight), tensor(head.layer_norm_bias)
        weight, bias = tensor(head.decoder_weight), tensor(head.decoder_bias)
        self.decoder = self.order.rows(weight, 0.0), self.order.rows(bias, float("-inf"))

    def reduce(self, hidden: Tensor) -> dict[str, Tensor]:
        """hidden [N, D] -> topk_ids [N, K], topk_logits [N, K], logsumexp [N, T]; chunk by chunk."""
        kind, pieces = hidden.device.type, []
        for chunk in hidden.split(MATMUL_POSITIONS[kind]):
            z = F.layer_norm(self.act(F.linear(chunk, *self.dense)), chunk.shape[-1:], *self.norm, self.eps)
            for logits in F.linear(z, *self.decoder).split(REDUCE_POSITIONS[kind]):
                pieces.append(
                    reduce_logits(
                        logits.to(torch.float32, copy=True), self.order, self.layout.top_k, self.temperatures
                    )
                )
        ids, logits, logsumexp = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return {"topk_ids": ids, "topk_logits": logits, "logsumexp": logsumexp}

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.layout.temperatures


class Capture:
    """Runs batches through the teacher and keeps what ``layout`` holds of them, nothing else.

    Logits are what the head gives in the teacher's dtype (float32 accumulation inside the matrix
    product); logsumexp is accumulated in float32 from them. Without top-k the head never runs.
    """

    def __init__(self, loaded: LoadedTeacher, layout: Layout) -> None:
        assert layout.vocab_size == loaded.head.decoder_weight.shape[0]
        self.loaded, self.layout = loaded, layout
        self.head = _Head(loaded, layout) if layout.top_k > 0 else None

    @torch.inference_mode()
    def batch(
        self, input_ids: np.ndarray, token_count: np.ndarray, masked_positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        """input_ids [B, L], token_count [B], masked_positions [B, M] (-1: unused) -> columns [B, P, ...].

        Dtypes are the store's; positions that are not recorded are zero.
        """
        longest = int(token_count.max())  # padding after the longest row is not computed
        hidden = self.encode(input_ids[:, :longest], token_count)  # [B, longest, D]
        rows, slots, positions = self._recorded(token_count, masked_positions)
        whole = self.layout.positions == "all" and len(rows) == hidden.shape[0] * hidden.shape[1]
        kept = (
            hidden.flatten(0, 1) if whole else hidden[torch.from_numpy(rows), torch.from_numpy(positions)]
        )  # [N, D]
        values: dict[str, np.ndarray] = {}
        if self.head is not None:
            values |= {name: tensor.cpu().numpy() for name, tensor in self.head.reduce(kept).items()}
        if self.layout.hidden_states == "float16":
            values["hidden_states"] = kept.to(torch.float16).cpu().numpy()
        elif self.layout.hidden_states == "int8":
            values["hidden_states"], values["hidden_scale"] = quantise(kept.float().cpu().numpy())
        columns = self.layout.columns()
        out = {name: np.zeros((len(input_ids), *columns[name].shape), columns[name].dtype) for name in values}
        for name, value in values.items():
            out[name][rows, slots] = value
        return out

    def encode(self, input_ids: np.ndarray, token_count: np.ndarray) -> Tensor:
        """Hidden states [B, L, D] of the last layer, in the teacher's dtype; no [tokens, V] anything."""
        device = self.loaded.device
        ids = torch.from_numpy(input_ids.astype(np.int64)).to(device)
        mask = None
        if token_count.min() < input_ids.shape[1]:
            real = np.arange(input_ids.shape[1]) < token_count[:, None]
            mask = torch.from_numpy(real.astype(np.int64)).to(device)
        return self.loaded.model(input_ids=ids, attention_mask=mask).last_hidden_state

    def _recorded(
        self, token_count: np.ndarray, masked_positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, slot and position of every recorded position of a batch, each [N]."""
        if self.layout.positions == "masked":
            rows, slots = np.nonzero(masked_positions >= 0)
            return rows, slots, masked_positions[rows, slots].astype(np.int64)
        rows, positions = np.nonzero(np.arange(self.layout.length) < token_count[:, None])
        return rows, positions, positions
