"""The recipe: one YAML file that says everything about a run, checked whole before anything is started."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
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

DEFAULT_STUDENT = "student"
"""Name of the only student of a recipe without ``students``."""
ROWS = ("teacher", "undistilled")
"""Rows of every report, which no student can be called."""
OPTIONAL = ("corpus", "teacher")
"""Sections that only the teacher pass needs."""
VARIANT_SECTIONS = ("student", "train")
"""What each of several students may set for itself."""
MAX_BYTES = 1 << 16
"""No recipe is this long; a larger file is something else."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Name, place and the nine sections of ``infra.sections``; valid by construction."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    output: str = "runs"
    corpus: sections.Corpus | None = None
    """Only the teacher pass reads it, and needs it."""
    sequences: sections.Sequences = field(default_factory=sections.Sequences)
    masking: sections.Masking = field(default_factory=sections.Masking)
    teacher: sections.Teacher | None = None
    """Only the teacher pass reads it, and needs it."""
    store: sections.Store = field(default_factory=sections.Store)
    student: sections.Student = field(default_factory=sections.Student)
    train: sections.Train = field(default_factory=sections.Train)
    students: dict[str, sections.Variant] = field(default_factory=dict)
    """Name -> settings of one of several students; what one leaves out is as in ``student`` and ``train``."""
    evaluation: sections.Evaluation = field(default_factory=sections.Evaluation)
    tracking: sections.Tracking = field(default_factory=sections.Tracking)

    def __post_init__(self) -> None:
        for field_name, value in (("name", self.name), *(("students", name) for name in self.students)):
            require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value) is not None,
                f"{field_name}: must be letters, digits, dots, dashes and underscores, at most 100,"
                f" not {value!r}",
            )
        alike = {name.lower() for name in self.students}
        require(
            len(alike) == len(self.students),
            f"students: two of {', '.join(self.students)} differ only in upper and lower case",
        )
        taken = alike & set(ROWS)
        require(
            not taken,
            f"students: {', '.join(taken)} is the name of another row of the report; choose another",
        )
        require(self.output != "", "output: names no directory")
        _check_across_sections(self)

    @property
    def root(self) -> str:
        """The directory of everything this recipe makes."""
        return storage.join(self.output, self.name)

    @property
    def store_path(self) -> str:
        """Directory or URL of the store."""
        return self.store.path or storage.join(self.root, "store")

    def refuse_outputs_in_store(self) -> None:
        """UserError where the store is around what the recipe makes: ``verify`` would call that foreign, and
        ``--repair`` would move it away."""
        places = (self.store_path, self.root)
        store, own = (path if storage.is_remote(path) else os.path.realpath(path) for path in places)
        if f"{own}/".startswith(store.rstrip("/") + "/"):
            raise UserError(
                f"store.path: {self.store_path} would hold {self.root}, where students and evaluation go;"
                " give the store a directory of its own"
            )

    def runs(self) -> dict[str, StudentRun]:
        """Every student of the recipe, by name, in the order of the file."""
        variants = self.students or {
            DEFAULT_STUDENT: sections.Variant(student=self.student, train=self.train)
        }
        return {
            name: StudentRun(self, name, variant.student, variant.train) for name, variant in variants.items()
        }

    def run(self, name: str) -> StudentRun:
        """The student of this name. UserError, with the nearest name, where the recipe has none."""
        runs = self.runs()
        if name not in runs:
            raise UserError(_unknown(f"the recipe has no student {name!r}", name, list(runs)))
        return runs[name]

    @property
    def evaluation_dir(self) -> str:
        return storage.join(self.root, "evaluation")

    def outcome(self, *names: str) -> dict[str, dict[str, Any]]:
        """The fields of these sections that change the outcome, JSON-able: its part of a fingerprint."""
        return {name: fingerprinted(getattr(self, name)) for name in names}

    def to_yaml(self) -> str:
        """Every field, defaults included; ``load_recipe`` of it gives an equal recipe."""
        return dump_yaml(plain(dataclasses.asdict(self)))

    def save(self, directory: str) -> None:
        """Publishes ``directory/recipe.yaml``."""
        storage.keep_bytes(storage.join(directory, "recipe.yaml"), self.to_yaml().encode())


@dataclass(frozen=True)
class StudentRun:
    """One student of a recipe: its settings, and where it is made."""

    recipe: Recipe
    name: str
    student: sections.Student
    train: sections.Train

    @property
    def directory(self) -> str:
        return storage.join(self.recipe.root, "students", self.name)

    @property
    def registered_name(self) -> str:
        """Its name in the model registry; several students have the recipe's with their own behind it."""
        name = self.recipe.tracking.model_name or self.recipe.name
        return f"{name}-{self.name}" if self.recipe.students else name

    def fingerprinted(self) -> dict[str, dict[str, Any]]:
        """The settings that decide what the student becomes, JSON-able."""
        return {"student": fingerprinted(self.student), "train": fingerprinted(self.train)}


def fingerprinted(section: Any) -> dict[str, Any]:
    """The fields of a section that change the result, JSON-able."""
    return {
        item.name: plain(getattr(section, item.name))
        for item in dataclasses.fields(section)
        if item.metadata["outcome"]
    }


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
        if (
            section in tree and tree[section] is None and section not in OPTIONAL
        ):  # a section whose keys are all commented out
            tree[section] = {}
    for override in overrides:
        _apply_override(tree, override)
    given = tree.pop("students", None) or {}
    recipe = _validated(tree, path)
    if given:
        recipe = _with_students(recipe, tree, given, path)
    _check_students(recipe, path)
    return recipe


def _with_students(recipe: Recipe, tree: dict[str, Any], given: Any, path: str) -> Recipe:
    """The recipe with its students, each checked as if it were the recipe's only one."""
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise UserError(f"{path}: students: expected a mapping of names, not {shown(given)}")
    variants = {}
    for name, own in given.items():
        where = f"{path}: students.{name}"
        own = {} if own is None else own
        if not isinstance(own, dict):
            raise UserError(f"{where}: expected a mapping of settings, not {shown(own)}")
        for section, values in own.items():
            if section not in VARIANT_SECTIONS:
                raise UserError(_unknown(f"{where}: unknown key {section}", section, list(VARIANT_SECTIONS)))
            if not isinstance(values, dict):
                raise UserError(f"{where}.{section}: expected a mapping of settings, not {shown(values)}")
        merged = {section: {**tree.get(section, {}), **own.get(section, {})} for section in VARIANT_SECTIONS}
        alone = _validated({**tree, **merged}, where)
        variants[name] = sections.Variant(student=alone.student, train=alone.train)
    try:
        return dataclasses.replace(recipe, students=variants)
    except ValueError as problem:
        raise UserError(f"{path}: {problem}") from None


# --- checks that need more than one section -------------------------------------------------------------


def _check_across_sections(recipe: Recipe) -> None:
    corpus, store = recipe.corpus, recipe.store
    if corpus is None:
        return
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
        store.positions != "pooled" or recipe.sequences.packing == "document",
        "store.positions: pooled keeps one vector a document; set sequences.packing: document",
    )
    require(
        store.positions != "masked" or recipe.masking.probability != 0,
        "store.positions: masked keeps nothing where masking.probability is 0",
    )


def _check_students(recipe: Recipe, path: str) -> None:
    """UserError where a student needs what the recipe's store will not hold."""
    if recipe.corpus is None:  # the store is there already, and is asked itself
        return
    for name, run in recipe.runs().items():
        where = f"students.{name}.train" if recipe.students else "train"
        for problem in unmet_needs(run.train, recipe.store):
            raise UserError(f"{path}: {where}.{problem}")


def unmet_needs(train: sections.Train, store: sections.Store) -> list[str]:
    """What the loss needs and a store with these settings lacks; each starts with a field of ``train``."""
    if store.positions == "pooled":
        return []
    problems = []
    if train.alpha_cos and store.hidden_states == "none":
        problems.append(
            "alpha_cos: the cosine term needs hidden states; set alpha_cos: 0 or store.hidden_states: float16"
        )
    if train.alpha_relation and store.replay_layers == 0:
        problems.append("alpha_relation: relations need a store with store.replay_layers: 1 or more")
    if train.alpha_ce and train.kl_positions == "all" and store.positions == "masked":
        problems.append("kl_positions: all, but the store keeps masked positions only; set it to masked")
    kind = train.soft_target_kind(store.hidden_states)
    if kind is None:
        return problems
    needs = SOFT_TARGETS[kind]
    if needs.hidden_states and store.hidden_states == "none":
        problems.append(f"soft_targets: {kind} needs store.hidden_states: float16 or int8, not none")
    if needs.top_k and store.top_k == 0:
        problems.append(f"soft_targets: {kind} needs store.top_k > 0")
    if needs.top_k and train.temperature not in store.temperatures:
        problems.append(
            f"temperature: {train.temperature:g} is not among the store's temperatures"
            f" {list(store.temperatures)}, which {kind} soft targets need"
        )
    return problems


# --- from a YAML tree to a Recipe -------------------------------------------------------------------------

_ADAPTER = TypeAdapter(Recipe)
_TYPES: dict[str, Any] = {
    name: kind for name, kind in typing.get_type_hints(Recipe).items() if not name.startswith("_")
}
SECTIONS: dict[str, dict[str, Any]] = {
    name: typing.get_type_hints(member)
    for name, kind in _TYPES.items()
    for member in (kind, *typing.get_args(kind))
    if dataclasses.is_dataclass(member) and member is not sections.Variant
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
    if section == "students":
        tree = _student_tree(tree, name, where)
        section, _, name = name.partition(".")[2].partition(".")
    if section not in SECTIONS:
        raise UserError(_unknown(f"{where}: unknown section {section}", section, list(SECTIONS)))
    if name not in SECTIONS[section]:
        raise UserError(_unknown(f"{where}: unknown key", name, list(SECTIONS[section])))
    values = tree.setdefault(section, {})
    if not isinstance(values, dict):
        raise UserError(f"{section}: expected a mapping of settings, not {shown(values)}")
    values[name] = _override_value(text, SECTIONS[section][name])


def _student_tree(tree: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The sections of one student of ``students``, for an override students.NAME.section.key."""
    students, student = tree.get("students"), name.partition(".")[0]
    if not isinstance(students, dict) or student not in students:
        raise UserError(_unknown(f"{where}: unknown student {student}", student, list(students or {})))
    students[student] = own = students[student] if isinstance(students[student], dict) else {}
    return own


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
