"""Nested mappings, such as recipes and fingerprints: their leaves, and the differences between two of
them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf by its dotted path; tuples come as lists."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", plain(value)


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what YAML and JSON can say."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def shown(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where two fingerprints differ, one line a leaf: ``masking.seed: 0 -> 1``; of the recipe in them as the
    user knows it, without ``recipe.`` in front."""
    before, after = (
        {key.removeprefix("recipe."): value for key, value in leaves(tree)} for tree in (old, new)
    )
    return [
        f"{key}: {shown(before[key]) if key in before else 'absent'}"
        f" -> {shown(after[key]) if key in after else 'absent'}"
        for key in sorted(before.keys() | after.keys())
        if key not in before or key not in after or before[key] != after[key]
    ]
