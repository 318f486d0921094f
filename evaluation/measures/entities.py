"""Finds the entities in tags as seqeval and CoNLL's conlleval do. `kinds.tokens` makes F1 of the counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Entity = tuple[str, int, int]
"""Type, position of the first word, position of the last word."""


def entities(tags: Sequence[str]) -> list[Entity]:
    """Returns the entities of one sentence, in order.

    A tag is ``O``, or a prefix (``B-``, ``I-``, ``E-`` or ``S-``) and a type. An entity also starts without
    ``B-`` if the type changes, and ends with ``E-`` or ``S-`` (seqeval 1.2.2's default, not its strict mode).
    """
    return list(_entities(tags))


def _entities(tags: Sequence[str]) -> Iterator[Entity]:
    last_prefix, last_type, first = "O", "", 0
    for word, tag in enumerate([*tags, "O"]):
        prefix, _, entity_type = str(tag).partition("-")
        if last_prefix in ("E", "S") or prefix in ("B", "S") or entity_type != last_type:
            if last_prefix != "O":
                yield last_type, first, word - 1
            first = word
        last_prefix, last_type = prefix, entity_type


def entity_counts(predicted: Sequence[str] | np.ndarray, expected: Sequence[str] | np.ndarray) -> list[int]:
    """Returns how many entities of a sentence are correct (type and both ends), predicted and expected."""
    predicted_entities, expected_entities = set(entities(list(predicted))), set(entities(list(expected)))
    correct = predicted_entities & expected_entities
    return [len(correct), len(predicted_entities), len(expected_entities)]
