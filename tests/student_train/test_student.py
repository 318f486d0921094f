"""Students have the weights that the store's teacher gives them, and are plain transformers models once
saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DistilBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from infra.errors import UserError
from infra.settings import sections
from offline_teacher.models.loading import load_model
from offline_teacher.models.weights import named_weights
from student_train.student.model import StudentModel, build_student

SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 20, "initializer_range": 0.5,
}  # fmt: skip


def saved(model: PreTrainedModel, directory: Path) -> tuple[dict[str, Any], str]:
    for parameter in model.parameters():  # biases and layer norms that are not trivial
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text()), str(directory)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    torch.manual_seed(0)
    return saved(BertForMaskedLM(BertConfig(**SMALL)), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    torch.manual_seed(0)
    config = RobertaConfig(**SMALL, type_vocab_size=1, pad_token_id=1)
    return saved(RobertaForMaskedLM(config), tmp_path_factory.mktemp("roberta"))


def built(
    config: dict[str, Any],
    directory: str | None = None,
    *,
    train: sections.Train | None = None,
    **student: Any,
) -> StudentModel:
    """Builds a student from a store with the weights of this directory; without a directory, from random
    weights."""
    weights = None if directory is None else named_weights(load_model(directory))
    section = sections.Student(**{"init": "random" if directory is None else "teacher", **student})
    return build_student(section, train or sections.Train(), config, weights)


def logits(student: StudentModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    z = student.head_transform(student.body(ids, mask.sum(1)).flatten(0, 1))
    return (z @ student.decoder_weight.T + student.decoder_bias).unflatten(0, ids.shape)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return torch.randint(5, 50, (2, 9)) * mask + (1 - mask), mask


@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_a_student_with_all_layers_is_the_teacher(family: str, request: pytest.FixtureRequest) -> None:
    config, directory = request.getfixturevalue(family)
    student = built(config, directory, layers=(0, 1, 2, 3)).eval()
    teacher = AutoModelForMaskedLM.from_pretrained(directory).eval()
    ids, mask = batch()
    expected = teacher(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits(student, ids, mask)[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)
    whole = student.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits(student, ids, mask), whole, rtol=1e-5, atol=1e-5)


def spoil(directory: str, family: str, says_tied: bool, drop: tuple[str, ...], equal: bool) -> dict[str, Any]:
    """Gives a teacher a decoder of its own (or an equal copy) and drops tensors. Returns its
    configuration."""
    head = {"bert": "cls.predictions", "roberta": "lm_head"}[family]
    path = Path(directory, "model.safetensors")
    tensors = load_file(path)
    words = tensors[f"{family}.embeddings.word_embeddings.weight"]
    tensors[f"{head}.decoder.weight"] = words.clone() if equal else 0.5 * torch.randn_like(words)
    tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"].clone()
    for name in drop:
        del tensors[f"{head}.{name}"]
    save_file(tensors, path, {"format": "pt"})
    config_path = Path(directory, "config.json")
    config = json.loads(config_path.read_text()) | {"tie_word_embeddings": says_tied}
    config_path.write_text(json.dumps(config))
    return config


# tensors that the file lacks, whether the decoder equals the embeddings -> whether the student's is tied
WEIGHTS_DECIDE = [
    ((), False, False),
    ((), True, True),
    (("decoder.weight",), True, True),
    (("decoder.weight", "decoder.bias"), True, True),
    (("decoder.bias",), False, False),
    (("bias",), False, False),
    (("bias", "decoder.bias"), False, False),
]


@pytest.mark.parametrize("says_tied", [True, False])
@pytest.mark.parametrize(("drop", "equal", "tied"), WEIGHTS_DECIDE)
@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_weights_decide_whether_the_decoder_is_tied(
    family: str,
    drop: tuple[str, ...],
    equal: bool,
    tied: bool,
    says_tied: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """Hidden states and logits follow the teacher's tensors, whatever its configuration says."""
    directory = shutil.copytree(request.getfixturevalue(family)[1], tmp_path / "teacher")
    config = spoil(str(directory), family, says_tied, drop, equal)
    student = built(config, str(directory), layers=(0, 1, 2, 3)).eval()
    assert student.model.config.tie_word_embeddings is tied
    assert (student.decoder_weight is student.model.get_input_embeddings().weight) is tied
    ids, mask = batch()
    hidden, expected = own_arithmetic(str(directory), family, ids, mask)
    torch.testing.assert_close(
        student.body(ids, mask.sum(1))[mask > 0], hidden[mask > 0], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(logits(student, ids, mask)[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)
    student.save(str(tmp_path / "student"))
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "student").eval()
    loaded = again(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(loaded, logits(student, ids, mask), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_places_of_a_saved_bias_hold_what_was_trained(
    roberta: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    student = built(roberta[0] | {"tie_word_embeddings": False})
    student.decoder_bias.add_(1)
    student.save(str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head.bias", "lm_head.decoder.bias"):
        assert torch.equal(saved[name], student.decoder_bias)


def own_arithmetic(
    directory: str, family: str, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes hidden states by the encoder alone and logits by the file's tensors, so no library ties
    weights."""
    tensors = load_file(Path(directory, "model.safetensors"))
    head = {"bert": "cls.predictions", "roberta": "lm_head"}[family]
    dense, norm = ("transform.dense", "transform.LayerNorm") if family == "bert" else ("dense", "layer_norm")
    hidden = AutoModel.from_pretrained(directory).eval()(input_ids=ids, attention_mask=mask).last_hidden_state

    def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tensors[f"{head}.{name}.weight"], tensors[f"{head}.{name}.bias"]

    z = torch.nn.functional.linear(hidden, *pair(dense))
    z = torch.nn.functional.layer_norm(torch.nn.functional.gelu(z), z.shape[-1:], *pair(norm), eps=1e-12)
    words = tensors[f"{family}.embeddings.word_embeddings.weight"]
    decoder = tensors.get(f"{head}.decoder.weight", words)
    no_bias = torch.zeros(len(words))
    bias = tensors.get(f"{head}.decoder.bias", tensors.get(f"{head}.bias", no_bias))
    return hidden, torch.nn.functional.linear(z, decoder, bias)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_layers_are_the_ones_chosen(family: str, request: pytest.FixtureRequest) -> None:
    config, directory = request.getfixturevalue(family)
    student = built(config, directory, layers=(1, 3)).eval()
    teacher = AutoModelForMaskedLM.from_pretrained(directory).eval()
    encoder = teacher.base_model.encoder
    encoder.layer = torch.nn.ModuleList([encoder.layer[1], encoder.layer[3]])
    ids, mask = batch()
    expected = teacher(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits(student, ids, mask)[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)


def test_step_zero_loss_with_and_without_the_token_type(shared_dir: Path) -> None:
    """A student starts with a lower loss if the token-type embedding is folded in than if it is dropped."""
    from transformers import AutoTokenizer

    teacher = str(shared_dir / "teacher")
    config = json.loads((shared_dir / "teacher/config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    text = sorted((shared_dir / "data/corpus/validation").glob("*.txt"))[0].read_text(encoding="utf-8")[
        2000:14000
    ]
    labels = torch.tensor(tokenizer(text).input_ids[: 16 * 128]).reshape(16, 128)
    ids = labels.clone()
    ids[:, 3::7] = tokenizer.mask_token_id
    student = built(config, teacher).eval()
    folded = masked_loss(student, ids, labels)
    with torch.no_grad():
        original = AutoModelForMaskedLM.from_pretrained(teacher, dtype=torch.float32).bert.embeddings
        student.model.distilbert.embeddings.position_embeddings.weight.copy_(
            original.position_embeddings.weight
        )
    dropped = masked_loss(student, ids, labels)
    print(f"MLM loss at step 0: folded {folded:.4f}, dropped {dropped:.4f}")
    assert folded < dropped


@torch.no_grad()
def masked_loss(student: StudentModel, ids: torch.Tensor, labels: torch.Tensor) -> float:
    at = ids != labels
    return float(
        torch.nn.functional.cross_entropy(logits(student, ids, torch.ones_like(ids))[at], labels[at])
    )


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_saved_model_loads_without_the_projection(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    config, _ = request.getfixturevalue(family)
    student = built(config, layers="last:2", hidden_size=8)
    hidden = student.body(batch()[0], batch()[1].sum(1))
    assert student.project(hidden).shape == (2, 9, 16)
    assert hidden.shape == (2, 9, 8)
    student.save(str(tmp_path))
    assert (tmp_path / "model.safetensors").is_file()
    loaded, loading = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = batch()
    expected = student.eval().model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(loaded.eval()(input_ids=ids, attention_mask=mask).logits, expected)
    assert AutoModel.from_pretrained(tmp_path).config.num_hidden_layers == 2


def test_architecture_of_a_berts_student(bert: tuple[dict[str, Any], str]) -> None:
    student = built(*bert, dropout=0.25)
    assert isinstance(student.model, DistilBertForMaskedLM)
    assert student.training
    assert student.decoder_weight is student.model.distilbert.embeddings.word_embeddings.weight
    assert student.projection is None
    config = student.model.config
    assert (config.dropout, config.attention_dropout, config.hidden_dim, config.n_layers) == (
        0.25,
        0.25,
        24,
        2,
    )
    names = [name for name, _ in student.named_parameters()]
    assert not any("token_type" in name or "pooler" in name for name in names)


def test_random_weights_follow_their_seed_and_leave_the_global_one(bert: tuple[dict[str, Any], str]) -> None:
    """This holds for the projection of a narrower student, too."""
    before = torch.random.get_rng_state()
    first, again, other = (
        built(bert[0], hidden_size=8, train=sections.Train(seed=seed)).state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("model.distilbert.embeddings.word_embeddings.weight", "projection.weight"):
        assert not torch.equal(first[name], other[name])


def test_a_start_from_the_teacher_does_not_depend_on_the_seed(bert: tuple[dict[str, Any], str]) -> None:
    first, other = (built(*bert, train=sections.Train(seed=seed)).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_loss_without_a_vocabulary_makes_an_encoder(bert: tuple[dict[str, Any], str]) -> None:
    train = sections.Train(alpha_ce=0, alpha_mlm=0)
    student = built(*bert, layers=(0, 1, 2, 3), train=train).eval()
    assert type(student.model).__name__ == "DistilBertModel"
    whole = built(*bert, layers=(0, 1, 2, 3)).eval()
    ids, mask = batch()
    torch.testing.assert_close(student.body(ids, mask.sum(1)), whole.body(ids, mask.sum(1)))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_narrower_student_starts_from_slices_of_the_teacher(
    family: str, request: pytest.FixtureRequest
) -> None:
    config, directory = request.getfixturevalue(family)
    student = built(config, directory, layers=(0, 3), hidden_size=8, intermediate_size=10)
    assert (student.model.config.hidden_size, student.decoder_weight.shape) == (8, (50, 8))
    whole = built(config, directory, layers=(0, 3))
    columns = {tuple(column.tolist()) for column in whole.decoder_weight.T}
    assert {tuple(column.tolist()) for column in student.decoder_weight.T} < columns
    assert student.projection is not None
    ids, mask = batch()
    assert torch.isfinite(logits(student, ids, mask)).all()


@pytest.mark.parametrize(
    ("student", "train", "sentence"),
    [
        ({"layers": (0, 4)}, {}, "no layer 4"),
        ({"layers": "last:5"}, {}, "deeper than the teacher"),
        ({"init": "random", "hidden_size": 18}, {}, "not a multiple of the student's 4 attention heads"),
        ({"hidden_size": 20}, {}, "student.hidden_size: 20 is more than the teacher's 16"),
        ({"intermediate_size": 30}, {}, "student.intermediate_size: 30 is more than the teacher's 24"),
        ({"attention_heads": 8}, {}, "student.attention_heads: 8 is more than the teacher's 4"),
        ({}, {"alpha_relation": 1, "relation_heads": 5}, "train.relation_heads: 5 does not divide"),
        ({}, {"alpha_relation": 1, "relation_layer": 2}, "no layer 2; the student has 2 layers"),
        ({}, {"alpha_relation": 1, "relation_layer": -3}, "no layer -3; the student has 2 layers"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    student: dict[str, Any], train: dict[str, Any], sentence: str, bert: tuple[dict[str, Any], str]
) -> None:
    with pytest.raises(UserError, match=sentence):
        built(*bert, train=sections.Train(**train), **student)


def test_what_the_store_does_not_hold(bert: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gpt2"):
        built({**bert[0], "model_type": "gpt2"}, bert[1])
    with pytest.raises(UserError, match="size mismatch"):
        built({**bert[0], "vocab_size": 60}, bert[1])
    with pytest.raises(UserError, match="does not hold the teacher's weights.*teacher_weights: false"):
        built(bert[0], init="teacher")
    AutoModel.from_pretrained(bert[1]).save_pretrained(tmp_path)  # an encoder without its head
    with pytest.raises(UserError, match="the store's teacher has no masked-LM head"):
        built(bert[0], str(tmp_path))
    encoder = sections.Train(alpha_ce=0, alpha_mlm=0)
    assert type(built(bert[0], str(tmp_path), train=encoder).model).__name__ == "DistilBertModel"
