"""The teacher's columns against a naive float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from transformers import AutoModelForMaskedLM

from infra.errors import UserError
from infra.settings.sections import Precision, Teacher
from offline_teacher.inference import columns as inference
from offline_teacher.inference.columns import Inference
from offline_teacher.inference.reduction import reduce_logits
from offline_teacher.inference.teacher import LoadedTeacher, load_teacher
from offline_teacher.inputs.source import check_fit
from offline_teacher.models.head import MaskedLmHead
from offline_teacher.models.loading import find_teacher, read_config, weight_digest
from offline_teacher.sequences.tokenizer import load_tokenizer
from offline_teacher.store.blocks import dequantise
from offline_teacher.store.schema import Layout
from tests.offline_teacher.tiny_teacher import save_bert, save_roberta

SAVERS: dict[str, Callable[[Path], Path]] = {"bert": save_bert, "roberta": save_roberta}


@pytest.fixture(scope="module", params=list(SAVERS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVERS[request.param](tmp_path_factory.mktemp(request.param))


def settings(directory: Path, dtype: Precision = "float32") -> Teacher:
    return Teacher(model=str(directory), dtype=dtype)


def load(directory: Path, dtype: Precision = "float32", replay_layers: int = 0) -> LoadedTeacher:
    return load_teacher(settings(directory, dtype), replay_layers, True, "cpu")


def check(directory: Path, length: int = 16) -> LoadedTeacher:
    """What a driver and a worker ask of a teacher, and its weights."""
    found = find_teacher(settings(directory))
    assert weight_digest(found)
    check_fit(found, read_config(found), load_tokenizer(found), length)
    return load(directory)


def layout_of(loaded: LoadedTeacher, **changes: object) -> Layout:
    values = {
        "length": 16,
        "masked": 3,
        "vocab_size": loaded.config.vocab_size,
        "hidden_size": loaded.config.hidden_size,
        "top_k": 6,
        "temperatures": (0.5, 1.0, 2.0),
        "hidden_states": "float16",
        "positions": "all",
    }
    return Layout(**{**values, **changes})


def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three sequences of 16, 9 and 12 tokens, the second with one unused masked slot."""
    input_ids = np.random.default_rng(0).integers(5, 90, (3, 16)).astype(np.uint16)
    token_count = np.array([16, 9, 12], np.uint16)
    for row, count in enumerate(token_count):
        input_ids[row, count:] = 1
    return input_ids, token_count, np.array([[1, 4, 8], [2, 3, -1], [0, 5, 11]], np.int16)


def own_outputs(directory: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """hidden states [B, L, D] of every depth and logits [B, L, V] of the model's own forward, float64."""
    model = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float64).eval()
    input_ids, token_count, _ = batch()
    mask = torch.from_numpy((np.arange(16) < token_count[:, None]).astype(np.int64))
    ids = torch.from_numpy(input_ids.astype(np.int64))
    ids[mask == 0] = model.config.pad_token_id
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return [hidden.numpy() for hidden in out.hidden_states], out.logits.numpy()


@pytest.mark.parametrize("replay_layers", [0, 1, 2])
def test_all_positions_against_the_oracle(directory: Path, replay_layers: int) -> None:
    """Hidden states are the input of the top layers; top-k and logsumexp are of the model's own logits."""
    hidden, logits = own_outputs(directory)
    loaded = load(directory, replay_layers=replay_layers)
    columns = Inference(loaded, layout_of(loaded, replay_layers=replay_layers)).batch(*batch())
    real = np.arange(16) < batch()[1][:, None]
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :6]
    assert np.array_equal(columns["topk_ids"][real], order[real])
    expected = np.take_along_axis(logits, order, -1)
    np.testing.assert_allclose(columns["topk_logits"][real], expected[real], rtol=1e-3, atol=1e-3)
    for j, temperature in enumerate((0.5, 1.0, 2.0)):
        expected = logsumexp(logits / temperature, axis=-1)
        np.testing.assert_allclose(columns["logsumexp"][..., j][real], expected[real], rtol=1e-5)
    states = hidden[-1 - replay_layers]
    np.testing.assert_allclose(columns["hidden_states"][real], states[real], rtol=1e-3, atol=1e-3)
    for name, values in columns.items():
        assert not values[~real].any(), name


def test_masked_positions_are_those_of_all(directory: Path) -> None:
    loaded = load(directory)
    everywhere = Inference(loaded, layout_of(loaded)).batch(*batch())
    masked = Inference(loaded, layout_of(loaded, positions="masked")).batch(*batch())
    assert masked["hidden_states"].shape == (3, 3, 32)
    np.testing.assert_array_equal(masked["hidden_states"][2, 1], everywhere["hidden_states"][2, 5])
    np.testing.assert_allclose(masked["logsumexp"][0, 2], everywhere["logsumexp"][0, 8], rtol=1e-6)
    assert not masked["topk_ids"][1, 2].any()


def test_int8_hidden_states_are_within_half_a_step(directory: Path) -> None:
    loaded = load(directory)
    columns = Inference(loaded, layout_of(loaded, hidden_states="int8", top_k=0)).batch(*batch())
    real = np.arange(16) < batch()[1][:, None]
    found = dequantise(columns["hidden_states"], columns["hidden_scale"])
    error = np.abs(found - own_outputs(directory)[0][-1])
    assert (error[real].max(-1) <= columns["hidden_scale"][real] * 0.501).all()


def test_a_state_that_float16_cannot_hold_is_refused(directory: Path) -> None:
    loaded = load(directory)
    with torch.no_grad():
        for parameter in loaded.lower.parameters():
            parameter.mul_(1e6)
    with pytest.raises(UserError, match=r"store\.hidden_states: float16 cannot hold .* bfloat16, or int8"):
        Inference(loaded, layout_of(loaded, top_k=0, replay_layers=0)).batch(*large())


def large() -> tuple[np.ndarray, np.ndarray, None]:
    return (*batch()[:2], None)


@pytest.mark.parametrize("replay_layers", [0, 1])
def test_without_topk_neither_head_nor_top_layers_run(
    directory: Path, monkeypatch: pytest.MonkeyPatch, replay_layers: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the top ran")

    loaded = load(directory, replay_layers=replay_layers)
    monkeypatch.setattr(MaskedLmHead, "decoder_input", refuse)
    monkeypatch.setattr("offline_teacher.models.replay.Replay.last_hidden", refuse)
    monkeypatch.setattr(inference, "reduce_logits", refuse)
    layout = layout_of(loaded, top_k=0, replay_layers=replay_layers)
    assert set(Inference(loaded, layout).batch(*batch())) == {"hidden_states"}
    assert load_teacher(settings(directory), replay_layers, False, "cpu").top is None


def test_sums_of_16_bit_products_are_kept_in_float32(directory: Path) -> None:
    of_cuda = torch.backends.cuda.matmul
    of_cuda.allow_bf16_reduced_precision_reduction = of_cuda.allow_fp16_reduced_precision_reduction = True
    load(directory, "bfloat16")
    assert not of_cuda.allow_bf16_reduced_precision_reduction
    assert not of_cuda.allow_fp16_reduced_precision_reduction


def test_logits_are_never_held_for_all_positions(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(logits: torch.Tensor, *rest: object) -> tuple[torch.Tensor, ...]:
        seen.append(len(logits))
        return reduce_logits(logits, *rest)  # type: ignore[arg-type]

    loaded = load(directory)
    whole = Inference(loaded, layout_of(loaded)).batch(*batch())
    monkeypatch.setattr(inference, "matmul_positions", lambda *arguments: 8)
    monkeypatch.setattr(inference, "reduce_logits", counted)
    chunked = Inference(loaded, layout_of(loaded)).batch(*batch())
    assert max(seen) == 8
    assert sum(seen) == 37
    np.testing.assert_array_equal(chunked["topk_ids"], whole["topk_ids"])
    np.testing.assert_allclose(chunked["logsumexp"], whole["logsumexp"], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_the_oracle(directory: Path, dtype: Precision) -> None:
    loaded = load(directory, dtype)
    columns = Inference(loaded, layout_of(loaded)).batch(*batch())
    hidden, logits = own_outputs(directory)
    assert np.abs(columns["hidden_states"][0] - hidden[-1][0]).max() < 0.2
    assert np.abs(columns["logsumexp"][0, :, 1] - logsumexp(logits[0], axis=-1)).max() < 0.2


def test_too_long_sequences_are_refused(directory: Path) -> None:
    check(directory, 64)
    with pytest.raises(UserError, match="64 positions"):
        check(directory, 65)
