"""Cut and replayed, a teacher gives what the whole model gives in float64; from float16 storage, nearly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from infra.errors import UserError
from offline_teacher.models.replay import Replay
from offline_teacher.models.split import lower_part
from offline_teacher.models.weights import named_weights, top_weights
from tests.offline_teacher.families.tiny_models import FAMILIES, MODELS, Oracle, batch, masked_lm, oracle

EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-10}


def replayed(model: object, n: int, dtype: torch.dtype = torch.float64) -> Replay:
    """Built as from a store: the configuration as JSON, tensors of the top alone."""
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[attr-defined]
    return Replay(config, top_weights(model, n), n, dtype)


def stored(model: object, n: int, ids: Tensor, count: Tensor) -> Tensor:
    """Entering the top n layers, float64 [B, L, D]."""
    import copy

    return lower_part(copy.deepcopy(model), n).double()(ids, count)


def at(real: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[real] for tensor in tensors)


def compare(replay: Replay, h: Tensor, count: Tensor, expected: Oracle, n: int, **tolerance: Any) -> None:
    """Last hidden states, logits and Q, K, V of every replayed layer, at real positions."""
    real = torch.arange(h.shape[1]) < count[:, None]
    last = replay.last_hidden(h, count)
    torch.testing.assert_close(*at(real, last.double(), expected.last_hidden), **tolerance)
    assert expected.logits is not None
    logits = replay.decoder_input(last) @ replay.decoder_weight.T + replay.decoder_bias
    torch.testing.assert_close(*at(real, logits.double(), expected.logits), **tolerance)
    for layer in range(n):
        wanted = expected.projected[len(expected.projected) - n + layer]
        both = replay.last_hidden_and_queries_keys_values(h, count, layer)
        torch.testing.assert_close(both[0][real], last[real], rtol=0, atol=0)
        for found in (replay.queries_keys_values(h, count, layer), both[1]):
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(*at(real, ours.double(), theirs), **tolerance)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_lower_part_and_replay_are_the_whole_model(family: str, n: int, padded: bool) -> None:
    model = masked_lm(family)
    ids, count = batch() if padded else batch(rows=(14, 14))
    expected = oracle(model, ids, count)
    h = stored(model, n, ids, count)
    real = torch.arange(ids.shape[1]) < count[:, None]
    entering = expected.states[len(expected.states) - 1 - n] if n else expected.last_hidden
    torch.testing.assert_close(*at(real, h, entering), **EXACT)
    assert not h[~real].any()
    replay = replayed(model, n)
    compare(replay, h, count, expected, n, **EXACT)
    assert replay.last_hidden(h, count).isfinite().all()


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_float16_in_float32(family: str, n: int) -> None:
    """float16 keeps 11 bits: a state of size 1 is off by 2.4e-4; the layers make it up to 8 times that."""
    model = masked_lm(family)
    ids, count = batch()
    h = stored(model, n, ids, count).half()
    compare(replayed(model, n, torch.float32), h, count, oracle(model, ids, count), n, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_is_made_where_nothing_is_padded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked_lm(family)
    ids, count = batch(rows=(14, 14))
    h, replay = stored(model, 1, ids, count), replayed(model, 1)
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*given: Any, **named: Any) -> Tensor:
        masks.append(named["attn_mask"])
        return attention(*given, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    expected = replay.last_hidden(h, torch.tensor([14, 14]))
    torch.testing.assert_close(replay.last_hidden(h, None), expected, rtol=0, atol=0)
    assert masks == [None, None] or family == "mpnet"  # whose attention is not torch's
    masks.clear()
    replay.last_hidden(h, torch.tensor([14, 13]))
    assert family == "mpnet" or masks[0].dtype == torch.bool


@pytest.mark.parametrize("family", FAMILIES)
def test_deepest_projections_cost_no_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked_lm(family)
    ids, count = batch()
    h, replay = stored(model, 2, ids, count), replayed(model, 2)
    linears = []
    linear = torch.nn.functional.linear

    def watched(*given: Tensor) -> Tensor:
        linears.append(given[1].shape)
        return linear(*given)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    replay.queries_keys_values(h, count)
    assert sum(shape[0] for shape in linears) == 3 * 16, "three projections and nothing else"
    linears.clear()
    replay.last_hidden_and_queries_keys_values(h, count)
    both = len(linears)
    linears.clear()
    replay.last_hidden(h, count)
    assert len(linears) == both, "the projections are shared"


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_top_and_rest_are_a_checkpoint(family: str, n: int, tmp_path: Path) -> None:
    """Two files and an index are what from_pretrained reads; the top holds no layer that is not replayed."""
    model = masked_lm(family)
    top = top_weights(model, n)
    rest = {name: tensor for name, tensor in named_weights(model).items() if name not in top}
    parts = {"top.safetensors": top, "rest.safetensors": rest}
    model.config.save_pretrained(tmp_path)
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {t: name for name, tensors in parts.items() for t in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    kind: Any = MODELS[family][1]
    read, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in read.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
    numbers = sum(tensor.numel() for tensors in parts.values() for tensor in tensors.values())
    assert numbers == sum(parameter.numel() for parameter in model.parameters())
    assert len([name for name in parts["top.safetensors"] if ".0." in name or "position_emb" in name]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_decoder_stays_untied_whatever_the_configuration_says(family: str) -> None:
    model = masked_lm(family)
    other = torch.randn(60, 16)
    model.get_output_embeddings().weight = torch.nn.Parameter(other)
    assert model.config.tie_word_embeddings
    assert sum(tensor.shape == (60, 16) for tensor in top_weights(model, 1).values()) == 1
    torch.testing.assert_close(replayed(model, 1, torch.float32).decoder_weight, other, rtol=0, atol=0)


@pytest.mark.parametrize(("family", "vocabulary"), [("xlm-roberta", 250_002), ("modernbert", 50_368)])
def test_large_vocabularies(family: str, vocabulary: int) -> None:
    model = masked_lm(family, vocab_size=vocabulary)
    ids, count = batch(length=6, rows=(6, 4), vocabulary=vocabulary)
    replay = replayed(model, 1)
    assert replay.decoder_weight.shape == (vocabulary, 16)
    assert replay.decoder_bias.shape == (vocabulary,)
    compare(replay, stored(model, 1, ids, count), count, oracle(model, ids, count), 1, **EXACT)


def test_biases_of_the_head_are_optional() -> None:
    model = masked_lm("modernbert", decoder_bias=False, classifier_bias=True, norm_bias=True)
    ids, count = batch()
    replay = replayed(model, 1)
    assert not replay.decoder_bias.any()
    compare(replay, stored(model, 1, ids, count), count, oracle(model, ids, count), 1, **EXACT)


def test_bert_takes_the_activation_of_its_configuration_and_roberta_does_not() -> None:
    for family in ("bert", "roberta", "mpnet"):
        model = masked_lm(family, hidden_act="relu")
        ids, count = batch()
        h = stored(model, 1, ids, count)
        compare(replayed(model, 1), h, count, oracle(model, ids, count), 1, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_alone_is_replayed_and_has_no_vocabulary(family: str) -> None:
    encoder = masked_lm(family).base_model
    ids, count = batch()
    expected = oracle(encoder, ids, count)
    assert expected.logits is None
    weights = named_weights(encoder)
    assert set(weights) < set(named_weights(masked_lm(family))), "names are the masked LM's"
    for n in (0, 1, 2):
        replay, h = replayed(encoder, n), stored(encoder, n, ids, count)
        real = torch.arange(ids.shape[1]) < count[:, None]
        torch.testing.assert_close(*at(real, replay.last_hidden(h, count), expected.last_hidden), **EXACT)
        for use in ("decoder_weight", "decoder_bias"):
            with pytest.raises(UserError, match="has no masked-LM head"):
                getattr(replay, use)
        with pytest.raises(UserError, match="has no masked-LM head"):
            replay.decoder_input(h)


def test_a_pooler_is_left_out() -> None:
    from transformers import BertModel

    encoder = BertModel(masked_lm("bert").config)
    assert encoder.pooler is not None
    part = lower_part(encoder, 1)
    ids, count = batch()
    part(ids, count)
    assert not any("pooler" in name for name in [*named_weights(encoder), *dict(part.named_parameters())])
    assert encoder.pooler is not None


def test_replay_stays_frozen_and_in_evaluation_mode() -> None:
    replay = replayed(masked_lm("bert"), 2)
    replay.train()
    assert not any(module.training for module in replay.modules())
    assert not any(parameter.requires_grad for parameter in replay.parameters())
    h = torch.randn(1, 3, 16, requires_grad=True)
    assert not replay.last_hidden(h).requires_grad


def test_what_cannot_be_replayed_is_one_line() -> None:
    model = masked_lm("bert")
    with pytest.raises(UserError, match="replay_layers: 5 is not from 0 to the teacher's 4 layers"):
        lower_part(model, 5)
    with pytest.raises(UserError, match="replay_layers: 5 is not"):
        Replay(model.config, {}, 5)
    with pytest.raises(UserError, match="no replayed layer 0"):
        replayed(model, 0).queries_keys_values(torch.zeros(1, 1, 16))
    with pytest.raises(UserError, match="no replayed layer 1"):
        replayed(model, 1).last_hidden_and_queries_keys_values(torch.zeros(1, 1, 16), None, 1)
    with pytest.raises(UserError, match=r"lack bert.encoder.layer.2.attention.self.query.weight, .* 13 more"):
        Replay(model.config, top_weights(model, 1), 2)
    narrow = masked_lm("bert", hidden_size=8)
    with pytest.raises(UserError, match="do not fit the configuration: size mismatch"):
        Replay(model.config, top_weights(narrow, 1), 1)
    with pytest.raises(UserError, match="'gpt2' is not a supported family of models; supported are bert, "):
        Replay({"model_type": "gpt2"}, {}, 1)
