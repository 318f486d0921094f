"""Entities in a sequence of tags, as seqeval (and CoNLL's conlleval) finds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Entity = tuple[str, int, int]
"""Type, first word, last word."""


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sentence.

    Tags are ``O`` or ``B-``, ``I-``, ``E-``, ``S-`` before a type. An entity also starts without ``B-`` where
    the type changes, and ends with ``E-`` or ``S-`` (seqeval 1.2.2's default, which is not its strict mode).
    """
    return list(_entities(tags))


def _entities(tags: Sequence[str]) -> Iterator[Entity]:
    before, kind, first = "O", "", 0
    for word, tag in enumerate([*tags, "O"]):
        mark, _, name = str(tag).partition("-")
        if _ends(before, mark, kind, name):
            yield kind, first, word - 1
        if _starts(before, mark, kind, name):
            first = word
        before, kind = mark, name


def _ends(before: str, mark: str, kind: str, name: str) -> bool:
    if before == "O":
        return False
    return before in ("E", "S") or mark in ("B", "S", "O") or kind != name


def _starts(before: str, mark: str, kind: str, name: str) -> bool:
    if mark == "O":
        return False
    return mark in ("B", "S") or before in ("E", "S", "O") or kind != name


def entity_counts(predicted: Sequence[str] | np.ndarray, expected: Sequence[str] | np.ndarray) -> list[int]:
    """Of one sentence: entities that are right (type and both ends), predicted, expected."""
    found, right = set(entities(list(predicted))), set(entities(list(expected)))
    return [len(found & right), len(found), len(right)]
