"""The work of a text worker: it turns text into numbered sequences, without torch and without a GPU."""

from __future__ import annotations

from typing import Any

from infra.errors import NodeError, UserError
from infra.files import storage
from infra.settings.recipe import Recipe
from offline_teacher.cluster.guarded import Guarded
from offline_teacher.corpus.documents import Part
from offline_teacher.sequences.building import Tokenising, build_part
from offline_teacher.sequences.packing import load_encoder
from offline_teacher.store.pending import read_spec


class TextWorker(Guarded):
    """Builds parts of the sequences, one at a time."""

    def __init__(self, recipe: Recipe) -> None:
        """``recipe`` must have ``masking.probability`` set."""
        self.recipe = recipe

    def prepare(self, root: str) -> dict[str, Any]:
        """Loads what every part needs, so that a node where this fails is found before it gets a part."""
        load_encoder(storage.join(root, "tokenizer"))
        self._layout, self._how = read_spec(root).layout, self._tokenising(root)
        return {}

    def build_part(self, root: str, split: str, number: int, part: Part) -> dict[str, Any]:
        """Publishes one part of the sequences and returns its ``{tokens}``."""
        index = build_part(root, self._layout, split, number, part, self._how)
        return {"tokens": index.tokens}

    def _tokenising(self, root: str) -> Tokenising:
        recipe, layout = self.recipe, read_spec(root).layout
        assert recipe.corpus is not None
        counted = layout.masked > 0 and recipe.masking.sampling == "frequency"
        return Tokenising(recipe.corpus, recipe.sequences, self._prompt(layout.positions), counted)

    def _prompt(self, positions: str) -> str:
        """The prefix that a sentence encoder expects before every text; empty if it expects none."""
        from offline_teacher.teacher_directory import find_teacher, read_pooling_of

        if positions != "pooled":
            return ""
        assert self.recipe.teacher is not None
        try:
            pooling = read_pooling_of(find_teacher(self.recipe.teacher))
        except UserError as error:  # the driver found the same model, so the cause is this node
            raise NodeError(str(error)) from error
        return pooling.prompt if pooling is not None else ""
