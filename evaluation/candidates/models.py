"""Checks model directories, computes digests of their content, and loads models with a task's head."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.control_tokens import read_as_text
from infra.errors import UserError, first_line
from infra.files import storage
from offline_teacher.families.positions import usable_length

if TYPE_CHECKING:
    import torch

    from evaluation.tasks.task import Task
    from infra.settings.sections import Evaluation

HUB = "hub:"
"""Prefix of a hub model's name, for names that could be mistaken for a path."""
WEIGHTS = "model.safetensors"
SHARDED_WEIGHTS = "model.safetensors.index.json"
_OTHER_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt"
)  # fmt: skip
"""Files, besides the weights, on which a score depends."""
_HEADS = ("classifier", "pre_classifier", "pooler", "head", "score", "qa_outputs", "regressor")
"""Modules whose weights may be missing in a model directory, because they belong to a task's head."""


@dataclass(frozen=True)
class Candidate:
    """A model that is evaluated, one row of the report."""

    name: str
    directory: str
    random_weights: bool = False
    """Whether the directory's weights are replaced by random ones, drawn from the seed."""
    taught_by: str | None = None
    """Name of the candidate whose fine-tuned models are the teachers of a second distillation."""
    student: str | None = None
    """Name of the student that this is, or whose architecture it has; None for other models."""

    def digest(self) -> str:
        """Returns the digest of all files on which a score depends: of the weights unless they are random."""
        names = storage.list_names(self.directory)
        weights = [] if self.random_weights else [name for name in names if name.endswith(".safetensors")]
        names = [name for name in names if name in _OTHER_FILES or name in weights]
        files = {name: storage.digest_file(storage.join(self.directory, name)) for name in names}
        return storage.digest_bytes(json.dumps(files, sort_keys=True).encode())


def require_model(directory: str, random_weights: bool = False) -> None:
    """Raises UserError if ``directory`` lacks config.json, a tokenizer or (if not random) weights."""
    names = storage.list_names(directory)
    if not names:
        remedy = f"a model of the hub is written owner/name or {HUB}name"
        raise UserError(f"{directory}: no such model directory; {remedy}")
    if "config.json" not in names:
        raise UserError(f"{directory}: no config.json; this is not a model directory")
    if not random_weights and WEIGHTS not in names and SHARDED_WEIGHTS not in names:
        other = [name for name in names if name.endswith((".bin", ".pt", ".h5", ".msgpack"))]
        hint = f" ({other[0]} is not read)" if other else ""
        raise UserError(f"{directory}: no {WEIGHTS}{hint}; save the model as safetensors")
    if not {"tokenizer.json", "vocab.txt", "vocab.json"} & set(names):
        raise UserError(f"{directory}: no tokenizer.json; save the tokenizer beside the model")
    config = storage.read_json(storage.join(directory, "config.json"))
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{directory}/config.json: no 'model_type'; this is not a model's config")


@contextmanager
def local_directory(source: str, revision: str | None = None) -> Iterator[str]:
    """Yields a local directory of a model: ``source`` itself, or a copy if it is a URL or a hub name.

    Hub names are ``owner/name`` or ``hub:name``; a revision may follow after ``@``. Raises UserError if the
    hub has no such model.
    """
    import tempfile

    if storage.is_remote(source):
        with tempfile.TemporaryDirectory() as copy:
            copy_files(source, copy)
            yield copy
    elif os.path.isdir(source) or not _is_hub_name(source):
        yield source
    else:
        name, _, pinned = source.removeprefix(HUB).partition("@")
        yield _from_hub(name, pinned or revision)


def copy_files(source: str, target: str) -> None:
    """Copies a directory's files, but not its folders; config.json is last, as it marks a complete model."""
    for name in sorted(storage.list_sizes(source), key=lambda name: (name == "config.json", name)):
        storage.publish_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))


def _is_hub_name(source: str) -> bool:
    """Returns whether ``source`` is ``owner/name`` or ``hub:name``, with or without ``@revision``.

    ``owner/name`` is a path if a folder ``owner`` exists, so that a typo downloads no model from the hub.
    """
    if source.startswith(HUB):
        return True
    owner = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/[\w.-]+(@[\w.-]+)?", source)
    return owner is not None and not os.path.exists(owner.group(1))


def _from_hub(name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            name, revision=revision, allow_patterns=["*.json", "*.safetensors", "vocab.txt", "merges.txt"]
        )
    except Exception as error:  # the library raises many unrelated types
        raise UserError(
            f"{name}: there is no such directory, and the hub's model cannot be loaded: {first_line(error)}"
        ) from error


def load_tokenizer(directory: str) -> Any:
    """Returns a model directory's fast tokenizer, which treats a ``[SEP]`` within a text as ordinary text.

    Raises UserError if there is no fast tokenizer, or if it has no pad token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, use_fast=True)
    except Exception as error:  # damaged files raise many unrelated types
        raise UserError(f"{directory}: the tokenizer cannot be loaded: {first_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        problem = "the tokenizer needs a tokenizer.json and a pad token; save one that has both"
        raise UserError(f"{directory}: {problem}")
    read_as_text(tokenizer)
    return tokenizer


def load_config(directory: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # an unknown architecture, a value out of range, code in the directory
        raise UserError(f"{directory}/config.json: cannot be used: {first_line(error)}") from error


def load_model(candidate: Candidate, task: Task, seed: int) -> Any:
    """Returns the candidate's model in float32 with a head for the task; new weights are drawn from ``seed``.

    Raises UserError for damaged weights, weights of another architecture, and code in the directory.
    """
    import torch

    from evaluation.kinds.registry import kind_of

    kind, config = kind_of(task), load_config(candidate.directory)
    torch.manual_seed(seed)
    for name, value in kind.head_config(task).items():
        setattr(config, name, value)
    model, missing = load_weights(kind.auto_class, candidate.directory, config, candidate.random_weights)
    absent = sorted(key for key in missing if not any(part in _HEADS for part in key.split(".")))
    if absent:
        raise UserError(
            f"{candidate.directory}: {WEIGHTS} lacks {len(absent)} tensors of the architecture in config.json"
            f" (first: {absent[0]}); give a complete model"
        )
    return model


def load_weights(auto_class: str, directory: str, config: Any, random: bool = False) -> tuple[Any, set[str]]:
    """Returns a float32 model of a class of transformers, and the names of weights that the directory lacks.

    ``random``: draw all weights instead. Raises UserError if the model cannot be loaded.
    """
    import torch
    import transformers
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind = getattr(transformers, auto_class)
    try:
        if random:
            return kind.from_config(config, dtype=torch.float32), set()
        model, report = kind.from_pretrained(
            directory, config=config, dtype=torch.float32, trust_remote_code=False, use_safetensors=True,
            ignore_mismatched_sizes=False, output_loading_info=True,
        )  # fmt: skip
        return model, set(report["missing_keys"])
    except Exception as error:  # damaged files raise many unrelated types
        raise UserError(f"{directory}: the model cannot be loaded: {first_line(error)}") from error


def require_fit(directory: str, config: Any, tokenizer: Any, length: int) -> None:
    """Raises UserError if a token id has no embedding or the model has fewer than ``length`` positions."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has ids up to {largest}, but the model only {config.vocab_size}"
            " embeddings; give the model its own tokenizer"
        )
    positions = usable_length(config)
    if length > positions:
        raise UserError(
            f"rows have {length} tokens (max_length of evaluation or of the task), but {directory} has only"
            f" {positions} positions; lower max_length"
        )


def require_loadable(candidates: Sequence[Candidate], tasks: Sequence[Task], settings: Evaluation) -> None:
    """Raises UserError if a model cannot be loaded, or does not fit its tokenizer, tasks or teacher."""
    from evaluation.kinds.registry import kind_of

    vocabularies = {}
    for candidate in candidates:
        tokenizer, config = load_tokenizer(candidate.directory), load_config(candidate.directory)
        vocabularies[candidate.name] = tokenizer.get_vocab()
        for task in tasks:
            require_fit(candidate.directory, config, tokenizer, task.max_length or settings.max_length)
        load_model(candidate, tasks[0], seed=0)  # finds damaged weights now, not after hours
    directories = {candidate.name: candidate.directory for candidate in candidates}
    per_token = [task.name for task in tasks if kind_of(task).per_token]
    for candidate in candidates:
        teacher = candidate.taught_by
        if per_token and teacher and vocabularies[candidate.name] != vocabularies[teacher]:
            raise UserError(
                f"second distillation on {per_token[0]}: the teacher's outputs belong to tokens, but "
                f"{candidate.directory} and {directories[teacher]} have different vocabularies; leave this"
                " task out"
            )


def parameters(model: torch.nn.Module) -> int:
    """Returns the number of parameters; tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def body_parameters(directory: str) -> int:
    """Returns the parameters of the encoder with embeddings and pooler, as papers count; reads no weights."""
    import torch
    from transformers import AutoModel

    config = load_config(directory)
    with torch.device("meta"):
        return parameters(AutoModel.from_config(config))


def weight_bytes(directory: str) -> int:
    """Returns the total size of the safetensors files in the directory, in bytes."""
    names = [name for name in storage.list_names(directory) if name.endswith(".safetensors")]
    return sum(storage.size(storage.join(directory, name)) for name in names)
