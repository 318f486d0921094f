"""Students of every family: with all layers they are their teacher, and what they cannot be is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from infra.errors import UserError
from infra.settings.sections import Student
from offline_teacher.models.head import masked_lm_head
from offline_teacher.models.split import encoder_mask
from offline_teacher.models.students import (
    Shape,
    choose_layers,
    new_student,
    planned_student,
    student_config,
    student_weights,
    widths,
)
from offline_teacher.models.weights import named_weights
from tests.offline_teacher.families.tiny_models import FAMILIES, batch, layers, masked_lm, oracle

STUDENT_CLASSES = {"bert": transformers.DistilBertForMaskedLM}
"""Of the families whose students are of another."""


def made(model: Any, chosen: tuple[int, ...], head: bool = True) -> Any:
    config = student_config(model.config, chosen, dropout=0.0)
    return new_student(config, student_weights(model.config, named_weights(model), chosen), head=head)


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (0, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_its_teacher_with_the_chosen_layers(family: str, chosen: tuple[int, ...]) -> None:
    """Exactly, in float64: the weights have so few bits that folding them into others loses nothing."""
    model = masked_lm(family)
    student = made(model, chosen)
    assert isinstance(student, STUDENT_CLASSES.get(family, type(model)))
    kept, number = layers(model), len(chosen)
    for place, layer in enumerate(chosen):
        kept[place] = kept[layer]
    del kept[number:]
    if family == "modernbert":
        model.config.layer_types = model.config.layer_types[:number]
    ids, count = batch()
    expected, found = oracle(model, ids, count), oracle(student, ids, count)
    real = torch.arange(ids.shape[1]) < count[:, None]
    for ours, theirs in zip(found.states, expected.states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-10)
    assert found.logits is not None
    assert expected.logits is not None
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_is_a_plain_model(family: str, tmp_path: Path) -> None:
    student = made(masked_lm(family), (0, 2))
    student.save_pretrained(tmp_path / "whole")
    read = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "whole")
    ids, count = batch()
    mask = torch.arange(ids.shape[1]) < count[:, None]
    torch.testing.assert_close(
        read(input_ids=ids, attention_mask=mask.long()).logits[mask],
        student.eval()(input_ids=ids, attention_mask=mask.long()).logits[mask],
    )
    made(masked_lm(family), (0, 2), head=False).save_pretrained(tmp_path / "encoder")
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert all("pooler" in name for name in info["missing_keys"])
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_mask_are_those_of_transformers(family: str) -> None:
    """The student's forward in training, in pieces, against the whole in float64; tied decoders are tied."""
    student = made(masked_lm(family), (0, 2)).double()
    ids, count = batch()
    mask = encoder_mask(student.config, count, ids.shape[1], ids.device, torch.float64)
    head = masked_lm_head(student)
    z = head.decoder_input(student.base_model(input_ids=ids, attention_mask=mask).last_hidden_state)
    logits = z @ head.decoder_weight.T + head.decoder_bias
    expected, real = oracle(student, ids, count).logits, torch.arange(ids.shape[1]) < count[:, None]
    assert expected is not None
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-10)
    assert head.decoder_weight is student.get_input_embeddings().weight
    logits[real].sum().backward()
    assert head.decoder_weight.grad is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_teacher_has_an_untied_student(family: str) -> None:
    model = masked_lm(family)
    other = torch.randn(60, 16)
    model.get_output_embeddings().weight = torch.nn.Parameter(other)
    student = made(model, (0, 2))
    torch.testing.assert_close(student.get_output_embeddings().weight.detach(), other, rtol=0, atol=0)
    words = model.get_input_embeddings().weight
    torch.testing.assert_close(student.get_input_embeddings().weight, words, rtol=0, atol=0)
    assert not student.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_and_dropout(family: str) -> None:
    config = student_config(masked_lm(family).config, (0, 3), Shape(hidden_size=8), dropout=0.25)
    student = new_student(config, None, head=True)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (8, 4, 2)
    wide = config.hidden_dim if hasattr(config, "hidden_dim") else config.intermediate_size
    assert wide == 12
    chances = {module.p for module in student.base_model.modules() if isinstance(module, torch.nn.Dropout)}
    assert chances == {0.25}
    shape = Shape(hidden_size=8, attention_heads=2, intermediate_size=20)
    config = student_config(masked_lm(family).config, (0, 3), shape)
    wide = config.hidden_dim if hasattr(config, "hidden_dim") else config.intermediate_size
    assert (config.num_attention_heads, wide) == (2, 20)


def test_random_weights_are_the_seeds_and_nothing_elses() -> None:
    config = student_config(masked_lm("bert").config, (0, 3))
    words = []
    for state, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        words.append(new_student(config, None, head=True, seed=seed).get_input_embeddings().weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(words[0], words[1])
    assert not torch.equal(words[1], words[2])


def test_distilbert_cannot_have_another_epsilon_so_the_student_is_a_bert() -> None:
    model = masked_lm("bert", layer_norm_eps=1e-5)
    student = made(model, (0, 1, 2, 3))
    assert isinstance(student, transformers.BertForMaskedLM)
    ids, count = batch()
    real = torch.arange(ids.shape[1]) < count[:, None]
    found, expected = oracle(student, ids, count).logits, oracle(model, ids, count).logits
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ("every_second", 6, (0, 2, 5)),
        ("every_second", 12, (0, 2, 4, 7, 9, 11)),
        ("every_second", 5, (0, 2, 4)),
        ("every_second", 24, (*range(0, 22, 2), 23)),
        ("every_second", 2, (0,)),
        ("last:2", 6, (4, 5)),
        ((1, 5), 6, (1, 5)),
    ],
)
def test_layer_choices(layers: Any, depth: int, expected: tuple[int, ...]) -> None:
    for teacher in (
        {"model_type": "bert", "num_hidden_layers": depth},
        {"model_type": "distilbert", "n_layers": depth},
    ):
        assert choose_layers(layers, teacher) == expected


def test_every_width_of_a_recipe_counts() -> None:
    """A width that the teacher's number of heads does not divide is fine for another number of heads."""
    student = Student(layers=(0, 3), init="random", hidden_size=10, attention_heads=5, intermediate_size=7)
    chosen, config = planned_student(student, masked_lm("bert").config)
    assert (chosen, widths(config)) == ((0, 3), (10, 7, 5))
    with pytest.raises(
        UserError, match="3 heads of 2 dimensions cannot be cut out of the teacher's 4 heads of 4"
    ):
        planned_student(Student(hidden_size=6, attention_heads=3), masked_lm("bert").config)


def test_what_cannot_be_a_student_is_one_line() -> None:
    config = masked_lm("bert").config
    with pytest.raises(UserError, match="last:5 is deeper than the teacher, which has 4 layers"):
        choose_layers("last:5", config)
    with pytest.raises(UserError, match="there is no layer 4; the teacher has 0 to 3"):
        choose_layers((0, 4), config)
    with pytest.raises(UserError, match="10 is not a multiple of the student's 4 attention heads"):
        student_config(config, (0, 1), Shape(hidden_size=10))
    chosen = student_config(config, (0, 1))
    weights = student_weights(config, named_weights(masked_lm("bert")), (0,))
    with pytest.raises(UserError, match="lack distilbert.transformer.layer.1.attention.q_lin.weight"):
        new_student(chosen, weights, head=True)
    narrow = student_config(config, (0,), Shape(hidden_size=8))
    with pytest.raises(UserError, match="do not fit the configuration: size mismatch"):
        new_student(narrow, weights, head=True)
    with pytest.raises(UserError, match="this BertModel has no masked-LM head"):
        masked_lm_head(masked_lm("bert").base_model)
