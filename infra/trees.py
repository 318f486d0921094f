"""Nested mappings (recipes, fingerprints): their leaves, and the differences between two mappings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted path and the value of every leaf; tuples become lists."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tuples_as_lists(value)


def tuples_as_lists(value: Any) -> Any:
    """Returns ``value`` with all tuples, nested ones too, as lists, because YAML and JSON have no tuples."""
    if isinstance(value, Mapping):
        return {key: tuples_as_lists(item) for key, item in value.items()}
    return [tuples_as_lists(item) for item in value] if isinstance(value, tuple | list) else value


def texts(value: Any) -> Iterator[str]:
    """Yields all text in a value, also in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts(item)


def shortened(value: Any) -> str:
    """Returns a value as YAML writes it, cut to 80 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns one line per leaf that differs between two fingerprints, for example ``masking.seed: 0 -> 1``.
    The prefix ``recipe.`` of a path is removed, so that settings have the names that users know."""
    before, after = ({key.removeprefix("recipe."): value for key, value in leaves(one)} for one in (old, new))
    return [
        f"{key}: {shortened(before[key]) if key in before else 'absent'}"
        f" -> {shortened(after[key]) if key in after else 'absent'}"
        for key in sorted(before.keys() | after.keys())
        if key not in before or key not in after or before[key] != after[key]
    ]
