"""Students are what their teachers' layers say, and plain transformers models once saved."""

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
    RobertaConfig,
    RobertaForMaskedLM,
)

from infra import sections
from infra.errors import UserError
from student_train.student.model import StudentModel, build_student, choose_layers

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 20, "initializer_range": 0.5,
}  # fmt: skip


def saved(model: torch.nn.Module, directory: Path) -> tuple[dict[str, Any], str]:
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


def logits(student: StudentModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    z = student.head_transform(student.body(ids, mask).flatten(0, 1))
    return (z @ student.decoder_weight.T + student.decoder_bias).unflatten(0, ids.shape)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return torch.randint(5, 50, (2, 9)) * mask + (1 - mask), mask


@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_a_student_with_all_layers_is_the_teacher(family: str, request: pytest.FixtureRequest) -> None:
    config, directory = request.getfixturevalue(family)
    student = build_student(sections.Student(layers=(0, 1, 2, 3)), config, directory).eval()
    teacher = AutoModelForMaskedLM.from_pretrained(directory).eval()
    ids, mask = batch()
    expected = teacher(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits(student, ids, mask)[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)
    whole = student.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits(student, ids, mask), whole, rtol=1e-5, atol=1e-5)


def spoil(directory: str, family: str, says_tied: bool, drop: tuple[str, ...], equal: bool) -> dict[str, Any]:
    """Gives a teacher a decoder of its own (or an equal copy), and drops tensors; its configuration."""
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
    """Of hidden states and logits: what the teacher's tensors give, whatever its configuration says."""
    directory = shutil.copytree(request.getfixturevalue(family)[1], tmp_path / "teacher")
    config = spoil(str(directory), family, says_tied, drop, equal)
    student = build_student(sections.Student(layers=(0, 1, 2, 3)), config, str(directory)).eval()
    assert student.model.config.tie_word_embeddings is tied
    assert (student.decoder_weight is student.model.get_input_embeddings().weight) is tied
    ids, mask = batch()
    hidden, expected = own_arithmetic(str(directory), family, ids, mask)
    torch.testing.assert_close(student.body(ids, mask)[mask > 0], hidden[mask > 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(student, ids, mask)[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)
    student.save(str(tmp_path / "student"))
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "student").eval()
    loaded = again(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(loaded, logits(student, ids, mask), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_places_of_a_saved_bias_hold_what_was_trained(
    roberta: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    student = build_student(
        sections.Student(init="random"), roberta[0] | {"tie_word_embeddings": False}, None
    )
    student.decoder_bias.add_(1)
    student.save(str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head.bias", "lm_head.decoder.bias"):
        assert torch.equal(saved[name], student.decoder_bias)


def own_arithmetic(
    directory: str, family: str, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states by the encoder alone, logits by the file's tensors: no tying by any library."""
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
    student = build_student(sections.Student(layers=(1, 3)), config, directory).eval()
    teacher = AutoModelForMaskedLM.from_pretrained(directory).eval()
    encoder = teacher.base_model.encoder
    encoder.layer = torch.nn.ModuleList([encoder.layer[1], encoder.layer[3]])
    ids, mask = batch()
    expected = teacher(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits(student, ids, mask)[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ("every_second", 6, (0, 2, 4)),
        ("every_second", 12, (0, 2, 4, 7, 9, 11)),
        ("every_second", 5, (0, 2, 4)),
        ("every_second", 24, tuple(range(0, 24, 2))),
        ("last:2", 6, (4, 5)),
        ("last:6", 6, (0, 1, 2, 3, 4, 5)),
        ((1, 5), 6, (1, 5)),
    ],
)
def test_layer_choices(layers: Any, depth: int, expected: tuple[int, ...]) -> None:
    assert choose_layers(layers, depth) == expected


def test_step_zero_loss_with_and_without_the_token_type(shared_dir: Path) -> None:
    """Folding the token-type embedding in starts the student strictly better than dropping it."""
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
    student = build_student(sections.Student(), config, teacher).eval()
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
    student = build_student(sections.Student(layers="last:2", init="random", hidden_size=8), config, None)
    hidden = student.body(*batch())
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
    student = build_student(sections.Student(dropout=0.25), *bert)
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


def test_random_initialisation_follows_its_seed_and_leaves_the_global_one(
    bert: tuple[dict[str, Any], str],
) -> None:
    recipe = sections.Student(init="random")
    before = torch.random.get_rng_state()
    first, again, other = (build_student(recipe, bert[0], None, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.decoder_weight, again.decoder_weight)
    assert not torch.equal(first.decoder_weight, other.decoder_weight)


def test_teacher_initialisation_does_not_depend_on_the_seed(bert: tuple[dict[str, Any], str]) -> None:
    first, other = (build_student(sections.Student(), *bert, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("recipe", "changed", "sentence"),
    [
        ({"layers": (0, 4)}, {}, "no layer 4"),
        ({"layers": "last:5"}, {}, "deeper than the teacher"),
        ({"init": "random", "hidden_size": 18}, {}, "not a multiple of the teacher's 4 attention heads"),
        ({}, {"model_type": "gpt2"}, "gpt2"),
        ({}, {"vocab_size": 60}, "vocab_size 50"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    recipe: dict[str, Any], changed: dict[str, Any], sentence: str, bert: tuple[dict[str, Any], str]
) -> None:
    with pytest.raises(UserError, match=sentence):
        build_student(sections.Student(**recipe), {**bert[0], **changed}, bert[1])


def test_weights_that_are_not_there(bert: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set teacher.model"):
        build_student(sections.Student(), bert[0], None)
    with pytest.raises(UserError, match="cannot read the weights"):
        build_student(sections.Student(), bert[0], str(tmp_path))
    AutoModel.from_pretrained(bert[1]).save_pretrained(tmp_path)  # an encoder without its head
    with pytest.raises(UserError, match="not a whole masked LM"):
        build_student(sections.Student(), bert[0], str(tmp_path))
