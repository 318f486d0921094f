"""The longest sequence a model computes: one more is an error of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import RobertaConfig

from infra.errors import UserError
from offline_teacher.families.positions import usable_length
from tests.offline_teacher.families.tiny_models import FAMILIES, MODELS, masked_lm


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_sequence_that_is_computed(family: str) -> None:
    model = masked_lm(family)
    length = usable_length(model.config)
    ids = torch.full((1, length + 1), 7)
    model(input_ids=ids[:, :length])
    if family == "modernbert":  # its rotary positions have no table
        assert length == 40
        return
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


@pytest.mark.parametrize(("family", "length"), [("roberta", 512), ("mpnet", 512), ("bert", 514)])
def test_512_positions_of_514(family: str, length: int) -> None:
    config = MODELS[family][0](**MODELS[family][2] | {"max_position_embeddings": 514})
    assert usable_length(config) == length


def test_mpnet_counts_from_2_whatever_its_padding_is() -> None:
    assert usable_length(masked_lm("mpnet", pad_token_id=0).config) == 38
    assert usable_length(masked_lm("roberta", pad_token_id=0).config) == 39


def test_roberta_without_a_padding_token_is_one_line() -> None:
    with pytest.raises(UserError, match="the configuration of the roberta has no pad_token_id"):
        usable_length(RobertaConfig(pad_token_id=None))
