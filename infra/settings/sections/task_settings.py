"""The settings of an entry of ``evaluation.tasks``: a user's own task, or changes to a built-in task.

An entry is the name of a built-in task, the path of a YAML file with fields of ``TaskSettings``, or a mapping
of these fields in the recipe. docs/tasks.md describes them for users.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from infra.errors import UserError
from infra.files import storage
from infra.files.paths import expand_home
from infra.recipe_words import expected, with_nearest_name
from infra.redaction import secret_in
from infra.trees import shortened
from infra.yaml_text import NotYaml, parse_yaml

Kind = Literal["classification", "multilabel", "regression", "tokens", "spans", "similarity", "retrieval"]
Format = Literal["csv", "tsv", "jsonl", "parquet", "conll", "squad"]
MAX_BYTES = 1 << 16
"""Largest size of a recipe file or a task file."""
FILES = (".yaml", ".yml")
PATHS = ("train", "dev", "test", "corpus", "queries")
"""Fields that name files, unless the data come from the hub."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The settings of a task; ``None`` and ``()`` mean that a setting is not given."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    kind: Kind | None = None
    """None: ``name`` is a built-in task."""
    train: str | None = None
    """Training examples: a file or URL, or the name of a split of ``hub``."""
    dev: str | None = None
    """Development examples, like ``train``. None: ``dev_fraction`` of the training examples."""
    test: str | None = None
    """Labelled test examples, like ``train``. Scores are reported on them; None: on ``dev``."""
    hub: str | None = None
    """Name of a dataset on the Hugging Face hub."""
    config: str | None = None
    revision: str | None = None
    """Commit, tag or branch of the hub's dataset."""
    format: Format | None = None
    """Format of the files. None: the suffix of the file name decides."""
    text: tuple[str, ...] = ()
    """One or two text columns. For ``tokens``, the column of words, or of a text with character spans."""
    label: str | None = None
    labels: tuple[str, ...] = ()
    """The classes in order. (): all labels of the training examples, sorted."""
    id: str | None = None
    """Column with the ids of the examples."""
    corpus: str | None = None
    """For ``retrieval``: file of the documents, in the format of BEIR's ``corpus.jsonl``."""
    queries: str | None = None
    """For ``retrieval``: file of the queries, in the format of BEIR's ``queries.jsonl``."""
    metrics: tuple[str, ...] = ()
    """Names of metrics; the first one is the task's score."""
    dev_fraction: float = 0.1
    split_seed: int = 0
    pooling: Literal["mean", "cls"] = "mean"
    """For ``similarity`` and ``retrieval``: how a text's embedding is computed from its hidden states."""
    epochs: float | tuple[float, ...] | None = None
    """None: as in ``evaluation``. A list is a grid, as for ``learning_rate`` and ``batch_size``."""
    learning_rate: float | tuple[float, ...] | None = None
    batch_size: int | tuple[int, ...] | None = None
    max_steps: int | None = None
    max_length: int | None = None


_ADAPTER = TypeAdapter(TaskSettings)
_TYPES = typing.get_type_hints(TaskSettings)
FIELDS = {item.name: _TYPES[item.name] for item in dataclasses.fields(TaskSettings)}


def read_yaml(path: str, noun: str) -> Any:
    """Returns the data of a YAML file. ``noun``: what the file contains, for error messages."""
    if storage.exists(path) and storage.size(path) > MAX_BYTES:
        raise UserError(f"{path}: a {noun} is at most {MAX_BYTES} bytes, this file is {storage.size(path)}")
    try:
        return parse_yaml(storage.read_bytes(path).decode())
    except (UnicodeDecodeError, NotYaml) as problem:
        raise UserError(f"{path}: not a {noun} in YAML: {problem}") from None


def is_file(entry: str) -> bool:
    """Returns whether an entry of ``evaluation.tasks`` names a file rather than a built-in task."""
    return entry.endswith(FILES)


def read_file(path: str) -> TaskSettings:
    """Returns the task of a YAML file; paths in it are relative to its folder. UserError for a mistake."""
    path = expand_home(path)
    if not storage.exists(path):
        raise UserError(f"evaluation.tasks: {path}: there is no such file")
    task = validated(read_yaml(path, "task"), path)
    folder = path.rpartition("/")[0]
    given = [name for name in PATHS if getattr(task, name) is not None and task.hub is None]
    for name in given:
        secret = secret_in(getattr(task, name))
        if secret is not None:
            raise UserError(f"{path}: {name}: holds {secret}; give credentials through the environment")
    paths: dict[str, Any] = {name: _relative_to(folder, getattr(task, name)) for name in given}
    return dataclasses.replace(task, **paths)


def _relative_to(folder: str, path: str) -> str:
    path = expand_home(path)
    absolute = path.startswith("/") or storage.is_remote(path)
    return path if absolute or not folder else storage.join(folder, path)


def validated(tree: Any, where: str) -> TaskSettings:
    """Returns the task of a mapping of settings. Raises UserError, which names ``where`` and the field."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: a task is a mapping of settings, this is {shortened(tree)}")
    tree = dict(tree)
    for name, value in tree.items():
        if name not in FIELDS:
            raise UserError(with_nearest_name(f"{where}: unknown key {name}", str(name), list(FIELDS)))
        if name in ("text", "labels", "metrics") and not isinstance(value, list | tuple | type(None)):
            tree[name] = [value]
    if "labels" in tree and isinstance(tree["labels"], list):
        tree["labels"] = [_number_as_text(value) for value in tree["labels"]]
    if "name" not in tree:
        raise UserError(f"{where}: name: is required, for example name: tickets")
    try:
        return _ADAPTER.validate_json(json.dumps(tree))  # JSON: strict, yet lists become tuples
    except ValidationError as problems:
        name = str(problems.errors()[0]["loc"][0])
        allowed = _allowed(FIELDS[name])
        raise UserError(f"{where}: {name}: expected {allowed}, not {shortened(tree[name])}") from None


def _number_as_text(value: Any) -> Any:
    """Returns a label that YAML reads as a number as text, as it occurs in the data."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _allowed(kind: Any) -> str:
    """Describes the values of a field; null is left out, since it stands for "not given"."""
    members = list(typing.get_args(kind) or (kind,))
    if typing.get_origin(kind) in (tuple, Literal):
        members = [kind]
    return " or ".join(expected(member) for member in members if member is not type(None))
