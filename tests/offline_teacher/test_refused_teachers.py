"""Teachers that cannot be used: one sentence each; and what is no reason to refuse one."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from infra.errors import UserError
from infra.settings.sections import Teacher
from offline_teacher.models.head import masked_lm_head
from offline_teacher.models.loading import find_teacher, load_model, weight_digest
from offline_teacher.models.weights import named_weights
from offline_teacher.sequences.tokenizer import load_tokenizer, tokenizer_digest
from tests.offline_teacher.test_teacher import check
from tests.offline_teacher.tiny_teacher import save_bert, save_roberta


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
