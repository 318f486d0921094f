"""CUDA graphs of the teacher, with a capture that runs the operations again: shapes, memory, masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from offline_teacher.inference.graphs import MOST_GRAPHS, GraphedLower
from offline_teacher.models.split import Lower, lower_part

SIZE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def encoder() -> Lower:
    torch.manual_seed(0)
    return lower_part(BertForMaskedLM(BertConfig(**SIZE)), 1)


def never(*_: Any, **__: Any) -> bool:
    return False


class Capturing:
    """Stands for the GPU: what is captured runs again on replay, into the memory of its first result."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.captured, self._patch = 0, monkeypatch

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.captured += 1
        if self._patch is not None:
            with self._patch.context() as patch:
                # What versions before 5.23 say while a graph is captured.
                patch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", never)
                result = function()
        else:
            result = function()
        result = result.clone()

        def replay() -> None:
            result.copy_(function())

        return result, replay


def text(seed: int, rows: int = 3, length: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, length + 1, (rows,), generator=generator)
    return torch.randint(5, 50, (rows, length), generator=generator), counts


@torch.no_grad()
def test_every_call_gives_what_the_encoder_gives(encoder: Lower) -> None:
    capturing = Capturing()
    graphed = GraphedLower(encoder, capturing)
    for seed in range(4):
        for length in (8, 6):
            ids, counts = text(seed, length=length)
            torch.testing.assert_close(graphed(ids, None), encoder(ids, None), rtol=0, atol=0)
            torch.testing.assert_close(graphed(ids, counts), encoder(ids, counts), rtol=0, atol=0)
    assert capturing.captured == 4  # two lengths, with and without padding


@torch.no_grad()
def test_a_shape_that_comes_once_is_not_captured_and_graphs_are_few(encoder: Lower) -> None:
    capturing = Capturing()
    graphed = GraphedLower(encoder, capturing)
    for rows in range(1, 2 * MOST_GRAPHS):
        graphed(text(0, rows)[0])
    assert capturing.captured == 0
    for rows in range(1, 2 * MOST_GRAPHS):
        ids, _ = text(1, rows)
        torch.testing.assert_close(graphed(ids), encoder(ids), rtol=0, atol=0)
    assert capturing.captured == MOST_GRAPHS


@torch.no_grad()
def test_a_captured_encoder_attends_without_a_mask(encoder: Lower, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []
    attention = functional.scaled_dot_product_attention

    def noted(*arguments: Any, **named: Any) -> Tensor:
        masks.append(named.get("attn_mask"))
        return attention(*arguments, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    graphed = GraphedLower(encoder, Capturing(monkeypatch))
    ids, counts = text(0)
    for _ in range(2):
        graphed(ids)
    assert masks
    assert all(mask is None for mask in masks)
    masks.clear()
    for _ in range(2):
        graphed(ids, counts)
    assert masks
    assert all(mask is not None for mask in masks)
    assert encoder.encoder.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_local_attention_keeps_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = ModernBertConfig(**SIZE, local_attention=4, layer_types=["sliding_attention", "full_attention"])
    encoder = lower_part(ModernBertForMaskedLM(config), 1)
    graphed = GraphedLower(encoder, Capturing(monkeypatch))
    for seed in range(3):
        ids, _ = text(seed)
        torch.testing.assert_close(graphed(ids), encoder(ids), rtol=0, atol=0)


@torch.no_grad()
def test_an_encoder_that_cannot_be_captured_runs_on_with_one_warning(encoder: Lower) -> None:
    def fails(function: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    graphed = GraphedLower(encoder, fails)
    ids, _ = text(0)
    graphed(ids)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs, slower: operation not permitted") as told:
        result = graphed(ids)
    assert len(told) == 1
    torch.testing.assert_close(result, encoder(ids), rtol=0, atol=0)
    graphed(ids)  # no second warning: pytest makes it an error
