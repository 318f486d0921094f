"""The error of float16 storage, measured on real models and held-out novels beside the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_teacher.models.loading import load_model
from offline_teacher.models.pooling import Pooling, pool, read_pooling
from offline_teacher.models.replay import Replay
from offline_teacher.models.split import lower_part
from offline_teacher.models.weights import top_weights

LENGTH, ROWS, TEMPERATURE = 128, 16, 2.0


def novels(shared_dir: Path, model: Path) -> tuple[Tensor, Tensor]:
    """16 sequences of up to 128, every seventh token masked: ids [B, L] and token_count [B]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = sorted((shared_dir / "data/corpus/validation").glob("*.txt"))
    pieces = [text.read_text(encoding="utf-8")[2000:] for text in texts[:4]]
    inside = LENGTH - 2
    ids = torch.full((ROWS, LENGTH), tokenizer.pad_token_id)
    count = torch.tensor([LENGTH if row % 2 == 0 else 40 + 5 * row for row in range(ROWS)])
    for row in range(ROWS):
        tokens = tokenizer(pieces[row % len(pieces)][:40_000], add_special_tokens=False).input_ids
        text = tokens[row * inside : row * inside + int(count[row]) - 2]
        text[3::7] = [tokenizer.mask_token_id] * len(text[3::7])
        ids[row, : count[row]] = torch.tensor([tokenizer.cls_token_id, *text, tokenizer.sep_token_id])
    return ids, count


@pytest.fixture(scope="module")
def directory(shared_dir: Path, request: pytest.FixtureRequest) -> Path:
    found = shared_dir / request.param
    if not found.is_dir():
        pytest.skip(f"no ../shared/{request.param} beside the repository")
    return found


@torch.no_grad()
def live(model: Any, ids: Tensor, count: Tensor) -> tuple[Any, list[Tensor]]:
    """The model's output in float32, and Q, K, V of its last layer."""
    projected: list[Tensor] = []
    attention = model.base_model.encoder.layer[-1].attention.self
    hooks = [
        module.register_forward_hook(lambda _, __, out: projected.append(out))
        for module in (attention.query, attention.key, attention.value)
    ]
    mask = (torch.arange(ids.shape[1]) < count[:, None]).long()
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return out, projected


def distance(logits: Tensor, live_logits: Tensor) -> float:
    """Mean L1 distance of distributions at T = 2; logits [N, V]."""
    p, q = (torch.softmax(x.double() / TEMPERATURE, -1) for x in (logits, live_logits))
    return float((p - q).abs().sum(-1).mean())


def relation_distance(x: Tensor, live_x: Tensor, count: Tensor, heads: int = 12) -> float:
    """Mean L1 distance of the rows of softmax(x x^T / sqrt(d)) over the real positions of [B, L, D]."""
    rows: list[Tensor] = []
    for ours, theirs, real in zip(x.double(), live_x.double(), count.tolist(), strict=True):
        a, b = (t[:real].unflatten(-1, (heads, -1)).transpose(0, 1) for t in (ours, theirs))  # [H, L, d]
        size = a.shape[-1] ** 0.5
        p, q = (torch.softmax(t @ t.transpose(1, 2) / size, -1) for t in (a, b))
        rows.append((p - q).abs().sum(-1).flatten())
    return float(torch.cat(rows).mean())


@pytest.mark.parametrize("directory", ["teacher"], indirect=True)
def test_distribution_and_relations_from_float16(directory: Path, shared_dir: Path) -> None:
    """1.0e-4 was measured for n = 0 and 1.2e-4 for n = 1, and 2.5e-4, 2.1e-4, 1.3e-4 for Q, K, V."""
    model = load_model(str(directory))
    ids, count = novels(shared_dir, directory)
    out, projected = live(model, ids, count)
    real = torch.arange(LENGTH) < count[:, None]
    for n, bound in ((0, 1.5e-4), (1, 1.8e-4)):
        replay = Replay(model.config, top_weights(model, n), n)
        h = lower_part(model, n)(ids, count).half()
        z = replay.decoder_input(replay.last_hidden(h, count)[real])
        logits = z @ replay.decoder_weight.T + replay.decoder_bias
        error = distance(logits, out.logits[real])
        assert 1e-6 < error <= bound, f"n = {n}"
    for name, ours, theirs, bound in zip(
        "QKV", replay.queries_keys_values(h, count), projected, (3.8e-4, 3.2e-4, 2e-4), strict=True
    ):
        error = relation_distance(ours, theirs, count)
        assert 1e-6 < error <= bound, name


@pytest.mark.parametrize("directory", ["embedder"], indirect=True)
def test_a_sentence_encoder_from_float16(directory: Path, shared_dir: Path) -> None:
    """Relations as good as the teacher's, vectors that point where the live ones point; no head."""
    model = load_model(str(directory))
    assert type(model).__name__ == "BertModel"
    pooling = read_pooling(str(directory))
    assert pooling == Pooling("mean", normalise=True, max_length=256)
    ids, count = novels(shared_dir, directory)
    out, projected = live(model, ids, count)
    expected = pool(out.last_hidden_state, count, pooling)
    for n in (0, 1):
        replay = Replay(model.config, top_weights(model, n), n)
        h = lower_part(model, n)(ids, count).half()
        vectors = pool(replay.last_hidden(h, count), count, pooling)
        cosine = (vectors * expected).sum(-1)
        assert float(cosine.min()) >= 0.99999
        assert float((vectors - expected).abs().max()) > 0
    for name, ours, theirs in zip("QKV", replay.queries_keys_values(h, count), projected, strict=True):
        assert 1e-6 < relation_distance(ours, theirs, count) <= 4e-4, name
