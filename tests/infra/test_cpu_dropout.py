"""Dropout of our own against torch's: the same arithmetic, another source of masks."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from infra.cpu import cpu_dropout
from infra.cpu.cpu_dropout import FastDropout, apply_dropout, draw_keep_mask, use_fast_dropout

CONFIGS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "distilbert": (
        DistilBertForMaskedLM,
        DistilBertConfig(
            vocab_size=50, max_position_embeddings=16, n_layers=2, n_heads=2, dim=8, hidden_dim=16,
            dropout=0.5, attention_dropout=0.5, pad_token_id=0,
        ),
    ),
    "roberta": (
        RobertaForMaskedLM,
        RobertaConfig(
            vocab_size=50, max_position_embeddings=18, num_hidden_layers=2, num_attention_heads=2,
            hidden_size=8, intermediate_size=16, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5,
            pad_token_id=0,
        ),
    ),
}  # fmt: skip
IDS = torch.arange(3, 27).reshape(2, 12)
MASK = (torch.arange(12) < torch.tensor([[12], [7]])).long()


@pytest.fixture(params=CONFIGS)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model as transformers makes it, and the same with our dropout; in training mode."""
    kind, config = CONFIGS[request.param]
    torch.manual_seed(0)
    theirs = kind(copy.deepcopy(config)).train()
    ours = kind(copy.deepcopy(config)).train()
    ours.load_state_dict(theirs.state_dict())
    use_fast_dropout(ours)
    return theirs, ours


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_share_and_independence_of_what_is_kept(p: float, native: bool) -> None:
    torch.manual_seed(0)
    keep, scale = draw_keep_mask(torch.Size((1000, 401)), p)
    if native:
        found = apply_dropout(torch.ones(1000, 401), p)
        keep = found != 0
        assert torch.equal(found[keep].unique(), torch.tensor([scale]))
    share, deviation = 1 - p, (p * (1 - p)) ** 0.5
    assert scale == pytest.approx(1 / share, rel=1e-3)
    assert abs(float(keep.double().mean()) - share) < 5 * deviation / 401_000**0.5
    assert abs(float(keep.double().mean(0).std()) - deviation / 1000**0.5) < 0.2 * deviation / 1000**0.5
    centred = keep.flatten().double() - share
    for lag in (1, 2, 3, 4, 8, 16, 32, 4096):  # neighbours come from one draw, blocks from one seed each
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 5 * deviation**2 / 400_000**0.5


def test_seed_decides() -> None:
    dropout, x = FastDropout(0.3).train(), torch.ones(7, 5)
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(dropout(x), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 33, 4095, 4096, 4097, 30_000])
def test_gradient_is_dropped_where_the_value_was(count: int, dtype: torch.dtype) -> None:
    x = torch.arange(1, count + 1, dtype=torch.float32).to(dtype).requires_grad_()
    torch.manual_seed(3)
    y = apply_dropout(x, 0.25)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient != 0, y != 0)
    scale = torch.tensor(4 / 3)
    torch.testing.assert_close(y, torch.where(gradient != 0, (x.float() * scale).to(dtype), 0))
    assert torch.equal(gradient.unique(), torch.tensor([0, scale]).to(dtype).unique()) or count < 30


def test_threads_do_not_change_what_is_dropped() -> None:
    found, threads = [], torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        torch.manual_seed(4)
        found.append(apply_dropout(torch.ones(3, 7_000), 0.4))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_same_masks_give_torchs_loss_and_gradients(
    models: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every mask drawn from one sequence by both, nothing else differs."""
    theirs, ours = models
    theirs.set_attn_implementation("eager")  # torch's attention draws inside an operator

    def mask(shape: torch.Size, p: float) -> tuple[torch.Tensor, float]:
        return torch.rand(shape) >= p, 1 / (1 - p)

    def dropout(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        keep, scale = mask(x.shape, p)
        return x * keep * scale

    monkeypatch.setattr(cpu_dropout, "_library", lambda: None)
    monkeypatch.setattr(cpu_dropout, "draw_keep_mask", mask)
    monkeypatch.setattr(nn.functional, "dropout", dropout)
    losses = []
    for model in models:
        torch.manual_seed(5)
        loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    pairs = zip(theirs.parameters(), ours.parameters(), strict=True)
    for one, other in pairs:
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_nothing_changes_in_evaluation(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    theirs, ours = (model.eval() for model in models)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=0)


def test_nothing_of_it_is_saved(models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path) -> None:
    for model, name in zip(models, ("theirs", "ours"), strict=True):
        model.save_pretrained(tmp_path / name)
    files = {name: (tmp_path / name / "config.json").read_text() for name in ("theirs", "ours")}
    assert json.loads(files["ours"]) == json.loads(files["theirs"])
    loaded = type(models[0]).from_pretrained(tmp_path / "ours")
    assert not any(isinstance(module, FastDropout) for module in loaded.modules())
    assert loaded.config._attn_implementation == "sdpa"
