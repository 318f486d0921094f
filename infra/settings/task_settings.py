"""A user's own task, or a built-in one with settings of its own: an entry of ``evaluation.tasks``.

An entry is a name of a built-in task, a YAML file of the fields of ``TaskSettings``, or those fields in
place. docs/tasks.md describes them for users.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from infra.errors import UserError
from infra.files import storage
from infra.files.paths import expand_home
from infra.settings.recipe_words import expected, with_nearest_name
from infra.settings.yaml_text import NotYaml, parse_yaml
from infra.trees import shortened

Kind = Literal["classification", "multilabel", "regression", "tokens", "spans", "similarity", "retrieval"]
Format = Literal["csv", "tsv", "jsonl", "parquet", "conll", "squad"]
MAX_BYTES = 1 << 16
FILES = (".yaml", ".yml")
PATHS = ("train", "dev", "test", "corpus", "queries")
"""Fields that name files, if the data are not the hub's."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What a task is made of. ``None`` and ``()`` stand for "not given"."""

    __pydantic_config__: typing.ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False
    )

    name: str
    kind: Kind | None = None
    """None: a built-in task of this name."""
    train: str | None = None
    """A file or URL; of a hub data set, a split. So are ``dev`` and ``test``."""
    dev: str | None = None
    """None: ``dev_fraction`` of the training examples."""
    test: str | None = None
    """Labelled examples, on which the scores are reported; None: they are those of ``dev``."""
    hub: str | None = None
    """A data set of the Hugging Face hub."""
    config: str | None = None
    revision: str | None = None
    """Of the hub's data set: a commit, tag or branch."""
    format: Format | None = None
    """None: by the ending of the file's name."""
    text: tuple[str, ...] = ()
    """One or two columns of texts; of ``tokens`` the column of words, or of a text with character spans."""
    label: str | None = None
    labels: tuple[str, ...] = ()
    """The classes, in order; () : all labels of the training examples, sorted."""
    id: str | None = None
    """Column of the examples' ids."""
    corpus: str | None = None
    """Of ``retrieval``: the documents, as ``corpus.jsonl`` of BEIR. ``queries`` likewise."""
    queries: str | None = None
    metrics: tuple[str, ...] = ()
    """The first one is the task's score."""
    dev_fraction: float = 0.1
    split_seed: int = 0
    pooling: Literal["mean", "cls"] = "mean"
    """Of ``similarity`` and ``retrieval``: how a text's vector comes from the states of its tokens."""
    epochs: float | tuple[float, ...] | None = None
    """None: as in ``evaluation``. A list is a grid; so it is of ``learning_rate`` and ``batch_size``."""
    learning_rate: float | tuple[float, ...] | None = None
    batch_size: int | tuple[int, ...] | None = None
    max_steps: int | None = None
    max_length: int | None = None


_ADAPTER = TypeAdapter(TaskSettings)
_TYPES = typing.get_type_hints(TaskSettings)
FIELDS = {item.name: _TYPES[item.name] for item in dataclasses.fields(TaskSettings)}


def is_file(entry: str) -> bool:
    """Whether an entry of ``evaluation.tasks`` names a file rather than a built-in task."""
    return entry.endswith(FILES)


def read_file(path: str) -> TaskSettings:
    """The task in a YAML file, whose paths are relative to its folder. UserError for any mistake in it."""
    path = expand_home(path)
    if not storage.exists(path):
        raise UserError(f"evaluation.tasks: {path}: there is no such file")
    if storage.size(path) > MAX_BYTES:
        raise UserError(f"{path}: a task file is at most {MAX_BYTES} bytes; this one is larger")
    try:
        tree = parse_yaml(storage.read_bytes(path).decode())
    except (UnicodeDecodeError, NotYaml) as problem:
        raise UserError(f"{path}: not a task in YAML: {problem}") from None
    task = validated(tree, path)
    folder = path.rpartition("/")[0]
    moved: dict[str, Any] = {
        name: _beside(folder, value)
        for name in PATHS
        if (value := getattr(task, name)) is not None and task.hub is None
    }
    return dataclasses.replace(task, **moved)


def _beside(folder: str, path: str) -> str:
    path = expand_home(path)
    absolute = path.startswith("/") or storage.is_remote(path)
    return path if absolute or not folder else storage.join(folder, path)


def validated(tree: Any, where: str) -> TaskSettings:
    """The task of a mapping; UserError, which names ``where`` and the field, for a wrong one."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: a task is a mapping of settings, this is {shortened(tree)}")
    tree = dict(tree)
    for name, value in tree.items():
        if name not in FIELDS:
            raise UserError(with_nearest_name(f"{where}: unknown key {name}", str(name), list(FIELDS)))
        if name in ("text", "labels", "metrics") and not isinstance(value, list | tuple | type(None)):
            tree[name] = [value]
    if "labels" in tree and isinstance(tree["labels"], list):
        tree["labels"] = [value if isinstance(value, bool) else _written(value) for value in tree["labels"]]
    if "name" not in tree:
        raise UserError(f"{where}: name: is required, for example name: tickets")
    try:
        return _ADAPTER.validate_json(json.dumps(tree))  # JSON: strict, yet lists become tuples
    except ValidationError as problems:
        name = str(problems.errors()[0]["loc"][0])
        allowed = _allowed(FIELDS[name])
        raise UserError(f"{where}: {name}: expected {allowed}, not {shortened(tree[name])}") from None


def _written(value: Any) -> Any:
    """A label that YAML reads as a number is the text that stands in the data."""
    return str(value) if isinstance(value, int | float) else value


def _allowed(kind: Any) -> str:
    members = list(typing.get_args(kind) or (kind,))
    if typing.get_origin(kind) in (tuple, Literal):
        members = [kind]
    return " or ".join(expected(member) for member in members if member is not type(None))
