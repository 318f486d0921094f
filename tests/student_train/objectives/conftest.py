"""A tiny teacher and its stores, made once per module."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForMaskedLM

from offline_teacher.store.store import Store
from tests.student_train.objectives.from_stores import SEQUENCES
from tests.student_train.tiny_run import make_store, make_teacher


@pytest.fixture(scope="module")
def teacher() -> BertForMaskedLM:
    return make_teacher()


@pytest.fixture(scope="module")
def stores(teacher: BertForMaskedLM, tmp_path_factory: pytest.TempPathFactory) -> typing.Callable[..., Store]:
    root, made = tmp_path_factory.mktemp("stores"), {}

    def store_of(**layout: Any) -> Store:
        """Returns a store of 20 sequences per split, made once per layout."""
        name = "-".join(f"{key}{value}" for key, value in layout.items()) or "plain"
        if name not in made:
            path: Path = root / name
            made[name] = make_store(
                path, teacher, sequences=SEQUENCES, held_out=SEQUENCES, masking_epochs=1, **layout
            )
        return made[name]

    return store_of
