"""The work of a text worker: it turns text into numbered sequences, without torch and without a GPU."""

from __future__ import annotations

from typing import Any

from offline_teacher.cluster.worker_base import Guarded
from offline_teacher.corpus.partition import Part
from offline_teacher.sequences.tokenised_parts import Tokenising


class TextWorker(Guarded):
    """Builds parts of the sequences of one store, one at a time."""

    def __init__(self, how: Tokenising) -> None:
        self._how = how

    def prepare(self) -> dict[str, Any]:
        """Loads what every part needs, so that a node where this fails is found before it gets a part."""
        return {"vocab_size": self._how.encoder.vocab_size}

    def build_part(self, split: str, number: int, part: Part) -> dict[str, Any]:
        """Publishes one part of the sequences and returns its ``{tokens}``."""
        return {"tokens": self._how.build(split, number, part).tokens}
