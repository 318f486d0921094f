"""Wording of messages: the types of a recipe's fields, and the nearest known name for an unknown one."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
_PLURALS = {str: "texts", int: "whole numbers", float: "numbers"}


def with_nearest_name(where: str, name: str, known: list[str], elsewhere: list[str] | None = None) -> str:
    """Returns the message ``where`` with a suggestion for the unknown name ``name``. The suggestion is the
    nearest of the ``known`` names. If none is near, it is the names in ``elsewhere``, or else the list of all
    known names."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or elsewhere
    return f"{where}; did you mean {' or '.join(near)}?" if near else f"{where}; known are {', '.join(known)}"


def union_members(kind: Any) -> tuple[Any, ...]:
    """Returns the types of which ``kind`` is the union, and the item type for a tuple; else ``(kind,)``."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(part for member in typing.get_args(kind) for part in union_members(member))
    if typing.get_origin(kind) is tuple:
        return union_members(typing.get_args(kind)[0])
    return (kind,)


def expected(kind: Any) -> str:
    """Describes the values of a field of this type, for example ``a whole number or null``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(expected(member) for member in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(value) for value in arguments)
    if origin is tuple and typing.get_origin(arguments[0]) is Literal:
        return f"a list of {expected(arguments[0])}"
    if origin is tuple:
        count = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"a list of {count}{_plural(union_members(arguments[0])[0])}"
    if origin is dict:
        return "a mapping of names to texts"
    return "a mapping of settings" if dataclasses.is_dataclass(kind) else _WORDS[kind]


def _plural(kind: Any) -> str:
    """Describes the items of a list; mappings by their keys, for example ``{store: ..., steps: ...}``."""
    if not dataclasses.is_dataclass(kind):
        return _PLURALS[kind]
    return "{" + ", ".join(f"{item.name}: ..." for item in dataclasses.fields(kind)) + "}"
