"""The recipe: one YAML file that says everything about a run, checked whole before anything is started."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, TypeAdapter, ValidationError

from infra import sections, storage
from infra.errors import UserError
from infra.paths import expand_settings
from infra.sections import SOFT_TARGETS, require
from infra.trees import leaves, plain, shown
from infra.yaml_text import NotYaml, dump_yaml, parse_yaml

MAX_BYTES = 1 << 16
"""No recipe is this long; a larger file is something else."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Name, place and the nine sections of ``infra.sections``; valid by construction."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    output: str = "runs"
    corpus: sections.Corpus
    sequences: sections.Sequences = field(default_factory=sections.Sequences)
    masking: sections.Masking = field(default_factory=sections.Masking)
    teacher: sections.Teacher
    store: sections.Store = field(default_factory=sections.Store)
    student: sections.Student = field(default_factory=sections.Student)
    train: sections.Train = field(default_factory=sections.Train)
    evaluation: sections.Evaluation = field(default_factory=sections.Evaluation)
    tracking: sections.Tracking = field(default_factory=sections.Tracking)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) is not None,
            f"name: must be letters, digits, dots, dashes and underscores, at most 100, not {self.name!r}",
        )
        require(self.output != "", "output: names no directory")
        _check_across_sections(self)

    @property
    def root(self) -> str:
        """The directory of everything this recipe makes."""
        return storage.join(self.output, self.name)

    @property
    def store_dir(self) -> str:
        return storage.join(self.root, "store")

    @property
    def validation_store_dir(self) -> str:
        return storage.join(self.root, "validation_store")

    @property
    def student_dir(self) -> str:
        return storage.join(self.root, "student")

    @property
    def evaluation_dir(self) -> str:
        return storage.join(self.root, "evaluation")

    def outcome(self, *names: str) -> dict[str, dict[str, Any]]:
        """The fields of these sections that change the outcome, JSON-able: its part of a fingerprint."""
        return {
            name: {
                item.name: plain(getattr(getattr(self, name), item.name))
                for item in dataclasses.fields(getattr(self, name))
                if item.metadata["outcome"]
            }
            for name in names
        }

    def to_yaml(self) -> str:
        """Every field, defaults included; ``load_recipe`` of it gives an equal recipe."""
        return dump_yaml(plain(dataclasses.asdict(self)))

    def save(self, directory: str) -> None:
        """Publishes ``directory/recipe.yaml``."""
        storage.keep_bytes(storage.join(directory, "recipe.yaml"), self.to_yaml().encode())


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; ``overrides`` are ``section.key=value`` (or ``name=``, ``output=``).

    Raises ``UserError``, one sentence naming the file or override, the field and what it should be.
    """
    if storage.exists(path) and storage.size(path) > MAX_BYTES:
        raise UserError(f"{path}: a recipe is at most {MAX_BYTES} bytes, this file is {storage.size(path)}")
    try:
        text = storage.read_bytes(path).decode()
        tree = parse_yaml(text)
    except (UnicodeDecodeError, NotYaml) as problem:
        raise UserError(f"{path}: not a recipe in YAML: {problem}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is {shown(tree)}")
    for section in SECTIONS:
        if section in tree and tree[section] is None:  # a section whose keys are all commented out
            tree[section] = {}
    for override in overrides:
        _apply_override(tree, override)
    return _validated(tree, path)


# --- checks that need more than one section -------------------------------------------------------------


def _check_across_sections(recipe: Recipe) -> None:
    corpus, store, train = recipe.corpus, recipe.store, recipe.train
    require(
        corpus.source == "hub" or (corpus.config is None and corpus.validation_split is None),
        f"corpus.config and corpus.validation_split are for source: hub, not {corpus.source}",
    )
    require(
        corpus.source != "hub" or not corpus.validation_path,
        "corpus.validation_path: a hub corpus takes its held-out text from corpus.validation_split",
    )
    require(
        corpus.source == "text" or corpus.document == "line",
        f"corpus.document: {corpus.document} is for source: text; a row of {corpus.source} is one document",
    )
    require(
        train.alpha_cos == 0 or store.hidden_states != "none",
        "train.alpha_cos: the cosine term needs hidden states; set train.alpha_cos: 0 or store.hidden_states",
    )
    needs_all = train.kl_positions == "all" and train.alpha_ce > 0
    require(
        not needs_all or store.positions == "all",
        "train.kl_positions: all, but store.positions: masked keeps nothing elsewhere; make both the same",
    )
    kind = train.soft_target_kind(store.hidden_states)
    if kind is None:
        return
    needs = SOFT_TARGETS[kind]
    require(
        not needs.hidden_states or store.hidden_states != "none",
        f"train.soft_targets: {kind} needs store.hidden_states: float16 or int8, not none",
    )
    require(not needs.top_k or store.top_k > 0, f"train.soft_targets: {kind} needs store.top_k > 0")
    require(
        not needs.top_k or train.temperature in store.temperatures,
        f"train.temperature: {train.temperature} is not among store.temperatures {list(store.temperatures)}, "
        f"which {kind} soft targets need",
    )


# --- from a YAML tree to a Recipe -------------------------------------------------------------------------

_ADAPTER = TypeAdapter(Recipe)
_TYPES: dict[str, Any] = {
    name: kind for name, kind in typing.get_type_hints(Recipe).items() if not name.startswith("_")
}
SECTIONS: dict[str, dict[str, Any]] = {
    name: typing.get_type_hints(kind) for name, kind in _TYPES.items() if dataclasses.is_dataclass(kind)
}
"""Section name -> field name -> type."""


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    where = f"override {key}"
    if not equals or not key.strip() or (key in SECTIONS):
        raise UserError(f"override {override!r}: write section.key=value, for example train.seed=1")
    if not dot:
        if key not in _TYPES:
            raise UserError(_unknown(where, key, ["name", "output"]))
        tree[key] = _override_value(text, _TYPES[key])
        return
    if section not in SECTIONS:
        raise UserError(_unknown(f"{where}: unknown section {section}", section, list(SECTIONS)))
    if name not in SECTIONS[section]:
        raise UserError(_unknown(f"{where}: unknown key", name, list(SECTIONS[section])))
    values = tree.setdefault(section, {})
    if not isinstance(values, dict):
        raise UserError(f"{section}: expected a mapping of settings, not {shown(values)}")
    values[name] = _override_value(text, SECTIONS[section][name])


def _override_value(text: str, kind: Any) -> Any:
    """YAML, except that what is not YAML (``*.txt``) and numbers meant for a text field stay text."""
    try:
        value = parse_yaml(text)
    except NotYaml:
        return text
    takes_text_only = str in _alternatives(kind) and not {int, float, bool} & set(_alternatives(kind))
    is_scalar = isinstance(value, int | float | bool)
    return text if is_scalar and takes_text_only else value


def _validated(tree: dict[str, Any], source: str) -> Recipe:
    for section, name in (("corpus", "path"), ("corpus", "validation_path"), ("evaluation", "tasks")):
        values = tree.get(section)
        if isinstance(values, dict) and isinstance(values.get(name), str):
            values[name] = [values[name]]
    expand_settings(tree)
    try:
        _refuse_broken_text(tree)
        _refuse_credentials(tree)
        _refuse_near_literals(tree)
        return _ADAPTER.validate_json(json.dumps(tree))  # JSON: strict, yet lists may become tuples
    except ValidationError as problems:
        errors = problems.errors(include_url=False)
        errors.sort(
            key=lambda error: "unexpected" not in error["type"]
        )  # a misspelt key is also a missing one
        others = len({error["loc"][:2] for error in errors}) - 1
        rest = f" ({others} more to put right after it)" if others else ""
        raise UserError(f"{source}: {_sentence(errors[0], tree)}{rest}") from None
    except ValueError as problem:
        raise UserError(f"{source}: {problem}") from None


def _sentence(error: Any, tree: dict[str, Any]) -> str:
    """What one pydantic error means, in our words and with the field's full name."""
    place = [str(part) for part in error["loc"]]
    outer, inner = (place + ["", ""])[:2]
    full = ".".join(place[:2])
    if error["type"] == "value_error":  # from a __post_init__: the sentence is ours already
        reason = str(error["ctx"]["error"])
        starts_with_field = reason.partition(":")[0] in SECTIONS.get(outer, {})
        return f"{outer}{'.' if starts_with_field else ': '}{reason}" if outer else reason
    if "unexpected" in error["type"]:
        return _unknown(f"unknown key {full}", place[-1], list(SECTIONS[outer]) if inner else list(_TYPES))
    if "missing" in error["type"] and len(place) <= 2:
        return f"{full}: is required, for example {_EXAMPLES[outer]}"
    if inner and isinstance(tree[outer], dict):
        return f"{full}: expected {_expected(SECTIONS[outer][inner])}, not {shown(tree[outer][inner])}"
    kind = "a mapping of settings" if outer in SECTIONS else _expected(_TYPES[outer])
    return f"{outer}: expected {kind}, not {shown(tree[outer])}"


_EXAMPLES = {
    "name": "name: my-run",
    "corpus": "corpus: {path: 'texts/*.txt'}",
    "teacher": "teacher: {model: bert-base-uncased}",
}


def _unknown(where: str, name: str, known: list[str]) -> str:
    """``where`` and the nearest known name, else the setting of that name in another section."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    near = near or [f"{section}.{name}" for section, names in SECTIONS.items() if name in names]
    return f"{where}; did you mean {' or '.join(near)}?" if near else f"{where}; known are {', '.join(known)}"


def _refuse_near_literals(tree: Mapping[str, Any]) -> None:
    """``true`` and ``1.0`` equal 1, but are not written 1."""
    for section, kinds in SECTIONS.items():
        values = tree.get(section)
        if not isinstance(values, dict):
            continue
        for name, value in values.items():
            kind = kinds.get(name)
            if typing.get_origin(kind) is Literal:
                near = any(
                    value == choice and type(value) is not type(choice) for choice in typing.get_args(kind)
                )
                require(not near, f"{section}.{name}: expected {_expected(kind)}, not {shown(value)}")


def _refuse_broken_text(tree: Mapping[str, Any]) -> None:
    """A name on the command line that is not UTF-8 comes as lone surrogates, which no file can hold."""
    for key, value in leaves(tree):
        told = f"{key}: {json.dumps(value, ensure_ascii=False)}"
        readable = told.encode(errors="backslashreplace").decode()
        require(told == readable, f"{readable} is not valid Unicode; rename what it names")


def _refuse_credentials(tree: Mapping[str, Any]) -> None:
    """The resolved recipe is written beside every output and into the tracking run."""
    for key, value in leaves(tree):
        for text in value if isinstance(value, list) else [value]:
            require(
                not _holds_password(text),
                f"{key}: holds a password; recipes are copied beside every output, so give credentials "
                "through the environment (AWS_*, MLFLOW_TRACKING_*, PGPASSWORD)",
            )


def _holds_password(text: Any) -> bool:
    if not isinstance(text, str) or "://" not in text:
        return False
    try:
        return bool(urlsplit(text).password)
    except ValueError:
        return False


# --- words for types and values ---------------------------------------------------------------------------

_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "null",
}
_PLURALS = {str: "texts", int: "whole numbers", float: "numbers"}


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, the item type of a tuple included; any other type alone."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(part for member in typing.get_args(kind) for part in _alternatives(member))
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[:1]
    return (kind,)


def _expected(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(member) for member in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(value) for value in arguments)
    if origin is tuple:
        count = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"a list of {count}{_PLURALS[arguments[0]]}"
    return _WORDS[kind]
