"""A model runs on as many tokens as ``usable_length`` says, and on not one more."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from infra.errors import UserError
from offline_teacher.families.positions import FROM_PADDING, usable_length

SIZE: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "pad_token_id": 1,
}
EXTRA: dict[str, dict[str, Any]] = {
    "longformer": {"attention_window": [4]},
    "xmod": {"languages": ["en"], "default_language": "en"},
}


@pytest.mark.parametrize(
    ("family", "positions", "usable"),
    [
        ("roberta", 514, 512),
        ("roberta", 512, 510),
        ("xlm-roberta", 514, 512),
        ("camembert", 514, 512),
        ("bert", 512, 512),
        ("distilbert", 512, 512),
        ("modernbert", 8192, 8192),
    ],
)
def test_the_usual_sizes(family: str, positions: int, usable: int) -> None:
    config = AutoConfig.for_model(family, max_position_embeddings=positions, pad_token_id=1)
    assert usable_length(config) == usable


@pytest.mark.parametrize("family", [*FROM_PADDING, "bert"])
@torch.no_grad()
def test_one_token_more_has_no_position(family: str) -> None:
    config = AutoConfig.for_model(family, **SIZE, **EXTRA.get(family, {}), max_position_embeddings=18)
    model = AutoModel.from_config(config).eval()
    usable = usable_length(config)
    row = torch.full((1, usable + 1), 5)
    assert model(input_ids=row[:, :-1]).last_hidden_state.shape[1] == usable
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=row)


def test_a_model_without_a_limit() -> None:
    assert usable_length(AutoConfig.for_model("xlnet")) == sys.maxsize


def test_positions_need_the_padding_they_are_counted_from() -> None:
    config = AutoConfig.for_model("roberta", pad_token_id=None)
    with pytest.raises(UserError, match="the roberta has no pad_token_id"):
        usable_length(config)
