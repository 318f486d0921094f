"""The teacher's columns against a naive float64 oracle; the reduction of logits; refused teachers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.special import logsumexp
from transformers import AutoModelForMaskedLM

from infra.cpu import native
from infra.errors import UserError
from infra.settings.sections import Precision, Teacher
from offline_teacher.inference import columns as inference
from offline_teacher.inference import reduction, reduction_kernel
from offline_teacher.inference.columns import Inference
from offline_teacher.inference.reduction import reduce_logits
from offline_teacher.inference.teacher import LoadedTeacher, load_teacher
from offline_teacher.models.head import MaskedLmHead, masked_lm_head
from offline_teacher.models.loading import load_model
from offline_teacher.models.weights import named_weights
from offline_teacher.store.quantise import dequantise
from offline_teacher.store.schema import Layout
from offline_teacher.teacher_directory import (
    check_fit,
    find_teacher,
    load_config,
    load_tokenizer,
    tokenizer_digest,
    weight_digest,
)
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
    check_fit(found, load_config(found), load_tokenizer(found), length)
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


def uncompiled(logits: torch.Tensor, top_k: int, temperatures: tuple[float, ...]) -> reduction.Reduced:
    """What a machine without a C++ compiler, and a GPU, does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction_kernel, "available", lambda: False)
        return reduce_logits(logits, top_k, temperatures)


REDUCTIONS = {"compiled": reduce_logits, "uncompiled": uncompiled}


def test_the_kernel_compiles_here() -> None:
    assert reduction_kernel.available()


@pytest.mark.parametrize("name", list(REDUCTIONS))
@given(
    seed=st.integers(0, 10_000), vocab=st.integers(3, 2_500), k=st.integers(1, 12), levels=st.integers(1, 40)
)
def test_reduction_is_exact_with_ties_to_the_lower_id(
    name: str, seed: int, vocab: int, k: int, levels: int
) -> None:
    """Few distinct values, so that ties cross block and top-k borders all the time."""
    k = min(k, vocab)
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-levels, levels + 1, (4, vocab)) * rng.choice([0.5, -0.5])).astype(np.float32)
    check_reduction(REDUCTIONS[name], torch.from_numpy(logits), k, (1.0, 2.0, 3.0))


@pytest.mark.parametrize("name", list(REDUCTIONS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("vocab", "k"), [(30_522, 64), (30_522, 2_000), (1_024, 1), (16, 16), (50_265, 64)])
def test_reduction_of_a_real_vocabulary(name: str, dtype: str, vocab: int, k: int) -> None:
    generator = torch.Generator().manual_seed(vocab + k)
    logits = (
        torch.randn(6, vocab, generator=generator) * torch.tensor([0.0, 0.01, 1.0, 4.0, 15.0, 40.0])[:, None]
    )
    check_reduction(REDUCTIONS[name], logits.to(getattr(torch, dtype)), k, (0.5, 1.0, 2.0, 4.0))


@pytest.mark.parametrize("name", list(REDUCTIONS))
def test_reduction_of_extreme_rows(name: str) -> None:
    """Far below the rest, -inf (a token that is switched off), one value only."""
    logits = torch.full((3, 100), -3e4)
    logits[0, 7], logits[1, 50:] = 9.0, float("-inf")
    check_reduction(REDUCTIONS[name], logits, 3, (1.0, 2.0))


@pytest.mark.parametrize("name", list(REDUCTIONS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("column", [0, 1_500, 2_999])
def test_reduction_of_nan_is_nan(name: str, dtype: str, column: int) -> None:
    logits = torch.zeros(2, 3_000, dtype=getattr(torch, dtype))
    logits[1, column] = float("nan")
    sums = REDUCTIONS[name](logits, 4, (1.0, 2.0))[2]
    assert sums.isnan().tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("k", [4, 700, 1_500])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_reduction_of_rows_of_nan(k: int, sign: float) -> None:
    """The processor's own NaN is negative: as keys such entries are below all others."""
    logits = torch.copysign(torch.full((3, 2_000), torch.nan), torch.tensor(sign))
    logits[1, :600] = 1.0
    ids, values, sums = reduction_kernel.reduce_logits(logits, k, (1.0, 2.0))
    assert sums.isnan().all()
    assert values[0].isnan().all()
    assert ((ids >= 0) & (ids < 2_000)).all()


def test_threads_do_not_change_the_reduction() -> None:
    logits, threads = torch.randn(7, 999, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(reduction_kernel.reduce_logits(logits, 5, (1.0, 2.0)))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def check_reduction(reduce: Any, logits: torch.Tensor, k: int, temperatures: tuple[float, ...]) -> None:
    """Ids and values exactly, logsumexp to float32's accuracy, against numpy in float64."""
    exact = logits.double().numpy()
    ids, values, sums = reduce(logits, k, temperatures)
    expected = np.argsort(-exact, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids.numpy(), expected)
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(exact, expected, -1))
    for j, temperature in enumerate(temperatures):
        np.testing.assert_allclose(sums[:, j], logsumexp(exact / temperature, axis=-1), rtol=2e-6, atol=2e-6)


def test_without_a_compiler_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    unwarned = reduction_kernel._library.__wrapped__
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler was found; install"):
        assert unwarned() is None


def test_a_compiler_that_fails_leaves_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    with pytest.warns(RuntimeWarning, match="the compiler failed"):
        assert reduction_kernel._library.__wrapped__() is None
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [(path.name, path.stat().st_size) for path in left] == [(".reduction_kernel.lock", 0)]


def test_digest_is_of_tensors_not_of_files(tmp_path: Path) -> None:
    one = save_bert(tmp_path / "one")
    model = AutoModelForMaskedLM.from_pretrained(one)
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert weight_digest(str(tmp_path / "many")) == weight_digest(str(one))
    other = save_bert(tmp_path / "other", seed=1)
    assert weight_digest(str(other)) != weight_digest(str(one))


def test_tokenizer_digest_ignores_the_state_of_the_last_call(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_bert(tmp_path)))
    before = tokenizer_digest(tokenizer)
    tokenizer("bab dob", truncation=True, max_length=3, padding="max_length")
    assert tokenizer_digest(tokenizer) == before


def _edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _cut_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()


def _header(directory: Path, header: object) -> None:
    data = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + b"\0" * 8)


def _relative_positions(directory: Path) -> None:
    """As checkpoints with relative positions have them: transformers leaves these weights out."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.encoder.layer.0.attention.self.distance_embedding.weight"] = torch.zeros(127, 16)
    save_file(tensors, path, {"format": "pt"})


REFUSED = {
    "anything": (lambda d: (d / "config.json").write_text("null"), "config.json cannot be read"),
    "deep": (lambda d: (d / "config.json").write_text("[" * 10**5), "config.json cannot be read"),
    "no size": (lambda d: _edit_config(d, hidden_size="big"), "config.json"),
    "no positions": (lambda d: _edit_config(d, max_position_embeddings=None), "config.json"),
    "an unknown activation": (lambda d: _edit_config(d, hidden_act="nope"), "hidden_act 'nope' is not"),
    "a decoder": (lambda d: _edit_config(d, is_decoder=True), "is_decoder is true"),
    "a header of anything": (lambda d: _header(d, []), "not a whole safetensors file"),
    "a header without ranges": (lambda d: _header(d, {"a": []}), "not a whole safetensors file"),
    "a range that runs back": (
        lambda d: _header(d, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}),
        "not a whole safetensors file",
    ),
    "other shapes": (
        lambda d: _edit_config(d, intermediate_size=40),
        r"other shapes than its config.json says: bert\.encoder.*\(\[\d+\], not \[40\]\)",
    ),
    "fewer layers": (
        lambda d: _edit_config(d, num_hidden_layers=1),
        r"no place for: bert\.encoder\.layer\.1",
    ),
    "more layers": (
        lambda d: _edit_config(d, num_hidden_layers=9),
        r"lacks weights of .*: bert\.encoder\.layer",
    ),
    "relative positions": (_relative_positions, "no place for: .*distance_embedding"),
    "no weights": (_no_weights, "no weights"),
    "cut weights": (_cut_weights, "not a whole safetensors file"),
    "no tokenizer": (_no_tokenizer, "tokenizer"),
    "another family": (
        lambda d: _edit_config(d, model_type="gpt2"),
        "'gpt2' is not a supported family of models; supported are",
    ),
    "no configuration": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "fewer rows than tokens": (
        lambda d: save_bert(d, vocab_size=50),
        "'[a-z]+' with id 92, its model only 50 rows",
    ),
    "one row too few": (lambda d: save_bert(d, vocab_size=92), "with id 92, its model only 92 rows"),
    "another pad id": (lambda d: _edit_config(d, pad_token_id=3), "not of the same vocabulary"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_teachers_are_named_in_one_sentence(tmp_path: Path, case: str) -> None:
    spoil, words = REFUSED[case]
    spoil(save_bert(tmp_path))
    with pytest.raises(UserError, match=words):
        check(tmp_path)


def test_a_roberta_without_a_padding_id_is_refused(tmp_path: Path) -> None:
    _edit_config(save_roberta(tmp_path), pad_token_id=None)
    with pytest.raises(UserError, match="has no pad_token_id"):
        check(tmp_path)


@pytest.mark.parametrize("says_tied", [True, False])
def test_weights_decide_whether_the_decoder_is_tied(tmp_path: Path, says_tied: bool) -> None:
    for own in (True, False):
        path = save_bert(tmp_path / str(own)) / "model.safetensors"
        tensors = load_file(path)
        if own:
            tensors["cls.predictions.decoder.weight"] = torch.ones(93, 32)
        save_file(tensors, path, {"format": "pt"})
        _edit_config(path.parent, tie_word_embeddings=says_tied)
        model = load_model(str(path.parent))
        assert ("cls.predictions.decoder.weight" in named_weights(model)) is own
        words = model.get_input_embeddings().weight
        expected = torch.ones_like(words) if own else words
        assert torch.equal(masked_lm_head(model).decoder_weight, expected)


@pytest.mark.parametrize("says_tied", [True, False])
@pytest.mark.parametrize("lost", [("decoder.bias",), ("bias",), ("decoder.bias", "bias")])
def test_a_decoders_bias_may_lie_in_one_place_or_none(
    tmp_path: Path, says_tied: bool, lost: tuple[str, ...]
) -> None:
    path = save_bert(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    bias = tensors["cls.predictions.bias"].clone()
    tensors |= {"cls.predictions.decoder.weight": torch.ones(93, 32), "cls.predictions.decoder.bias": bias}
    for name in lost:
        del tensors[f"cls.predictions.{name}"]
    save_file(tensors, path, {"format": "pt"})
    _edit_config(tmp_path, tie_word_embeddings=says_tied)
    found = masked_lm_head(load_model(str(tmp_path))).decoder_bias
    assert torch.equal(found, torch.zeros(93) if len(lost) == 2 else bias)


def test_rows_without_a_token_are_no_reason(tmp_path: Path) -> None:
    loaded = check(save_bert(tmp_path, vocab_size=1100))
    assert loaded.top is not None
    assert loaded.top.decoder_weight.shape[0] == 1100


def test_weights_a_masked_lm_does_without_are_no_reason(tmp_path: Path) -> None:
    path = save_bert(tmp_path) / "model.safetensors"
    more = {"cls.seq_relationship.weight": torch.zeros(2, 8), "bert.pooler.dense.bias": torch.zeros(8)}
    more["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(load_file(path) | more, path, {"format": "pt"})
    check(tmp_path)


def test_too_long_sequences_are_refused(directory: Path) -> None:
    check(directory, 64)
    with pytest.raises(UserError, match="64 positions"):
        check(directory, 65)


def test_a_missing_teacher_is_named() -> None:
    with pytest.raises(UserError, match="no directory"):
        find_teacher(Teacher(model="./nowhere"))
    with pytest.raises(UserError, match="neither a local directory nor a model"):
        find_teacher(Teacher(model="someone/nothing"))


def test_the_answer_of_a_hub_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> str:
        try:
            raise ConnectionError("429 Client Error: Too Many Requests\nRequest ID: 1")
        except ConnectionError as answer:
            raise FileNotFoundError("not in the cache") from answer

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(UserError, match=r"ConnectionError: 429 Client Error: Too Many Requests\);"):
        find_teacher(Teacher(model="someone/throttled"))
