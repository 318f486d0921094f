"""Reads a recipe from a YAML file and a command line's overrides; each mistake gives a one-line error."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from infra.errors import UserError
from infra.files.paths import expand_settings
from infra.recipe_words import expected, union_members, with_nearest_name
from infra.redaction import secret_in
from infra.settings import sections
from infra.settings.recipe import Recipe, unmet_needs
from infra.settings.sections import require
from infra.settings.sections.task_settings import read_yaml, validated
from infra.trees import leaves, shortened, texts
from infra.yaml_text import NotYaml, parse_yaml

OPTIONAL = ("corpus", "teacher")
"""Sections that only the teacher pass needs."""
VARIANT_SECTIONS = ("student", "train")
"""Sections that each of several students may set for itself."""
_ADAPTER = TypeAdapter(Recipe)
_HINTS = typing.get_type_hints(Recipe)
_TYPES: dict[str, Any] = {name: kind for name, kind in _HINTS.items() if not name.startswith("_")}
SECTIONS: dict[str, dict[str, Any]] = {
    name: typing.get_type_hints(member)
    for name, kind in _TYPES.items()
    for member in (kind, *typing.get_args(kind))
    if dataclasses.is_dataclass(member) and member is not sections.Variant
}
"""Section name -> field name -> type."""


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; ``overrides`` are ``section.key=value`` (or ``name=``, ``output=``). Raises
    UserError, whose one sentence names the file or override, the field and the values that it takes."""
    tree = read_yaml(path, "recipe")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is {shortened(tree)}")
    for section in SECTIONS:
        if section in tree and tree[section] is None and section not in OPTIONAL:
            tree[section] = {}  # `section:` whose keys are all commented out is read as null
    for override in overrides:
        _apply_override(tree, override)
    students = tree.pop("students", None) or {}
    recipe = _validated(tree, path)
    if students:
        recipe = _with_students(recipe, tree, students, path)
    _check_students(recipe, path)
    return recipe


def _with_students(recipe: Recipe, tree: dict[str, Any], students: Any, path: str) -> Recipe:
    """Returns the recipe with its students, each checked as if it were the recipe's only one."""
    if not isinstance(students, dict) or not all(isinstance(name, str) for name in students):
        raise UserError(f"{path}: students: expected a mapping of names, not {shortened(students)}")
    variants = {}
    for name, own in students.items():
        where = f"{path}: students.{name}"
        own = {} if own is None else own
        if not isinstance(own, dict):
            raise UserError(f"{where}: expected a mapping of settings, not {shortened(own)}")
        for section, values in own.items():
            if section not in VARIANT_SECTIONS:
                raise UserError(_unknown(f"{where}: unknown key {section}", section, list(VARIANT_SECTIONS)))
            if not isinstance(values, dict):
                raise UserError(f"{where}.{section}: expected a mapping of settings, not {shortened(values)}")
        merged = {section: {**tree.get(section, {}), **own.get(section, {})} for section in VARIANT_SECTIONS}
        only_student = _validated({**tree, **merged}, where)
        variants[name] = sections.Variant(student=only_student.student, train=only_student.train)
    try:
        return dataclasses.replace(recipe, students=variants)
    except ValueError as problem:
        raise UserError(f"{path}: {problem}") from None


def _check_students(recipe: Recipe, path: str) -> None:
    """Raises UserError if a student needs something that the recipe's store will not contain."""
    if recipe.corpus is None:  # the store exists already, and training checks its manifest
        return
    for name, run in recipe.runs().items():
        where = f"students.{name}.train" if recipe.students else "train"
        for problem in unmet_needs(run.train, recipe.store):
            raise UserError(f"{path}: {where}.{problem}")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    first, dot, rest = key.partition(".")
    where = f"override {key}"
    if not equals or not key.strip() or (key in SECTIONS):
        raise UserError(f"override {override!r}: write section.key=value, for example train.seed=1")
    if not dot:
        if key not in _TYPES:
            raise UserError(_unknown(where, key, ["name", "output"]))
        tree[key] = _override_value(text, _TYPES[key])
        return
    target, section, name = tree, first, rest
    if first == "students":
        target = _student_tree(tree, rest, where)
        section, _, name = rest.partition(".")[2].partition(".")
    if section not in SECTIONS:
        raise UserError(_unknown(f"{where}: unknown section {section}", section, list(SECTIONS)))
    if name not in SECTIONS[section]:
        raise UserError(_unknown(f"{where}: unknown key", name, list(SECTIONS[section])))
    values = target.setdefault(section, {})
    if not isinstance(values, dict):
        raise UserError(f"{section}: expected a mapping of settings, not {shortened(values)}")
    values[name] = _override_value(text, SECTIONS[section][name])


def _student_tree(tree: dict[str, Any], rest: str, where: str) -> dict[str, Any]:
    """Returns the mapping of one student's sections, for an override ``students.NAME.section.key=value``.
    ``rest``: the part after ``students.``."""
    students, student = tree.get("students"), rest.partition(".")[0]
    if not isinstance(students, dict) or student not in students:
        raise UserError(_unknown(f"{where}: unknown student {student}", student, list(students or {})))
    students[student] = own = students[student] if isinstance(students[student], dict) else {}
    return own


def _override_value(text: str, kind: Any) -> Any:
    """Parses the value of an override as YAML. Invalid YAML (such as ``*.txt``) stays text. So does a number
    or a boolean if the field takes only text."""
    try:
        value = parse_yaml(text)
    except NotYaml:
        return text
    takes_text_only = str in union_members(kind) and not {int, float, bool} & set(union_members(kind))
    is_scalar = isinstance(value, int | float | bool)
    return text if is_scalar and takes_text_only else value


def _validated(tree: dict[str, Any], source: str) -> Recipe:
    for section, name in (("corpus", "path"), ("corpus", "validation_path"), ("evaluation", "tasks")):
        values = tree.get(section)
        if isinstance(values, dict) and isinstance(values.get(name), str):
            values[name] = [values[name]]
    expand_settings(tree)
    _read_tasks(tree, source)
    try:
        _refuse_broken_text(tree)
        refuse_credentials(tree)
        _refuse_near_literals(tree)
        # As JSON, because in strict mode pydantic accepts a list for a tuple only from JSON.
        return _ADAPTER.validate_json(json.dumps(tree))
    except ValidationError as problems:
        errors = problems.errors(include_url=False)
        # Unexpected keys first: a misspelt key is also reported as a missing one.
        errors.sort(key=lambda error: "unexpected" not in error["type"])
        others = len({error["loc"][:2] for error in errors}) - 1
        rest = f" (other wrong fields: {others})" if others else ""
        raise UserError(f"{source}: {_sentence(errors[0], tree)}{rest}") from None
    except ValueError as problem:
        raise UserError(f"{source}: {problem}") from None


def _read_tasks(tree: dict[str, Any], source: str) -> None:
    """Checks the tasks whose settings are written in the recipe, and adds the defaults to these settings."""
    section = tree.get("evaluation")
    tasks = section.get("tasks") if isinstance(section, dict) else None
    tasks = [tasks] if isinstance(tasks, dict) else tasks
    if isinstance(section, dict) and isinstance(tasks, list):
        for number, entry in enumerate(tasks):
            if isinstance(entry, dict):
                where = f"{source}: evaluation.tasks[{number}]"
                tasks[number] = dataclasses.asdict(validated(entry, where))
        section["tasks"] = tasks


def _sentence(error: Any, tree: dict[str, Any]) -> str:
    """Returns a sentence for one pydantic error, with the full name of the field."""
    keys = [str(key) for key in error["loc"]]
    outer, inner = (keys + ["", ""])[:2]
    full = ".".join(keys[:2])
    if error["type"] == "value_error":  # raised by a __post_init__ of the recipe, with a complete sentence
        reason = str(error["ctx"]["error"])
        starts_with_field = reason.partition(":")[0] in SECTIONS.get(outer, {})
        return f"{outer}{'.' if starts_with_field else ': '}{reason}" if outer else reason
    in_mapping = len(keys) > 2 and isinstance(error["loc"][2], str)
    nested = _nested_fields(outer, inner) if in_mapping else {}
    if nested:
        full = ".".join(keys)
        if "unexpected" in error["type"]:
            return with_nearest_name(f"unknown key {full}", keys[2], list(nested))
        return f"{full}: expected {expected(nested[keys[2]])}, not {shortened(tree[outer][inner][keys[2]])}"
    if "unexpected" in error["type"] and len(keys) <= 2:
        return _unknown(f"unknown key {full}", keys[-1], list(SECTIONS[outer]) if inner else list(_TYPES))
    if "missing" in error["type"] and len(keys) <= 2:
        return f"{full}: is required, for example {_EXAMPLES[outer]}"
    if inner and isinstance(tree[outer], dict):
        return f"{full}: expected {expected(SECTIONS[outer][inner])}, not {shortened(tree[outer][inner])}"
    kind = "a mapping of settings" if outer in SECTIONS else expected(_TYPES[outer])
    return f"{outer}: expected {kind}, not {shortened(tree[outer])}"


def _nested_fields(section: str, name: str) -> dict[str, Any]:
    """Returns field name -> type of a setting that is itself a mapping of settings; {} for other settings."""
    return {
        key: kind
        for member in union_members(SECTIONS[section][name])
        if dataclasses.is_dataclass(member)
        for key, kind in typing.get_type_hints(member).items()
    }


_EXAMPLES = {
    "name": "name: my-run",
    "corpus": "corpus: {path: 'texts/*.txt'}",
    "teacher": "teacher: {model: bert-base-uncased}",
}


def _unknown(where: str, name: str, known: list[str]) -> str:
    """Returns the message ``where`` with a suggestion: the nearest known name, or else the same setting in
    another section."""
    elsewhere = [f"{section}.{name}" for section, names in SECTIONS.items() if name in names]
    return with_nearest_name(where, name, known, elsewhere)


def _refuse_near_literals(tree: Mapping[str, Any]) -> None:
    """Raises ValueError for ``true`` or ``1.0`` if a setting takes 1, since pydantic considers them equal."""
    for section, kinds in SECTIONS.items():
        values = tree.get(section)
        if not isinstance(values, dict):
            continue
        for name, value in values.items():
            kind = kinds.get(name)
            if typing.get_origin(kind) is Literal:
                choices = typing.get_args(kind)
                near = any(value == choice and type(value) is not type(choice) for choice in choices)
                require(not near, f"{section}.{name}: expected {expected(kind)}, not {shortened(value)}")


def _refuse_broken_text(tree: Mapping[str, Any]) -> None:
    """Raises ValueError for text that is not valid Unicode. Python turns bytes of a command line that are not
    UTF-8 into lone surrogates, which no file can hold."""
    for key, value in leaves(tree):
        text = f"{key}: {json.dumps(value, ensure_ascii=False)}"
        readable = text.encode(errors="backslashreplace").decode()
        require(text == readable, f"{readable} is not valid Unicode; rename the file or directory")


def refuse_credentials(tree: Mapping[str, Any]) -> None:
    """Raises ValueError for a secret in a URL, since settings are saved with the outputs and in MLflow."""
    for key, value in leaves(tree):
        for text in texts(value):
            secret, names = secret_in(text), "AWS_*, AZURE_*, MLFLOW_TRACKING_*, PGPASSWORD"
            reason = "settings are saved with every output, so give credentials through the environment"
            require(secret is None, f"{key}: holds {secret}; {reason} ({names})")
