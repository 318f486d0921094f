"""A narrower student's start: what is kept of one matrix is kept of every matrix that it meets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from infra.errors import UserError
from offline_teacher.families import family_of
from offline_teacher.models.slicing import _rotary_dimensions, sliced_weights, starting_weights
from offline_teacher.models.students import Shape, new_student, student_config, student_weights
from offline_teacher.models.weights import named_weights
from tests.offline_teacher.families.tiny_models import FAMILIES, batch, masked_lm

SEPARATE = [family for family in FAMILIES if family != "modernbert"]
LAYERS = (0, 3)


def start(model: Any, shape: Shape, layers: tuple[int, ...] = LAYERS) -> tuple[Any, dict[str, torch.Tensor]]:
    """Configuration and sliced tensors of a student."""
    config = student_config(model.config, layers, shape)
    weights = student_weights(model.config, named_weights(model), layers)
    return config, sliced_weights(config, weights, model.config.num_attention_heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sliced_student_runs(family: str) -> None:
    config, weights = start(masked_lm(family), Shape(hidden_size=8))
    student = new_student(config, weights, head=True)
    ids, count = batch()
    logits = student(
        input_ids=ids, attention_mask=(torch.arange(ids.shape[1]) < count[:, None]).long()
    ).logits
    assert torch.isfinite(logits).all()
    encoder = new_student(config, weights, head=False)
    assert encoder.config.hidden_size == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_all_are_all(family: str) -> None:
    model = masked_lm(family)
    config, weights = start(model, Shape())
    for name, tensor in student_weights(model.config, named_weights(model), LAYERS).items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("family", SEPARATE)
@pytest.mark.parametrize(
    "shape",
    [Shape(hidden_size=8), Shape(hidden_size=8, attention_heads=2), Shape(intermediate_size=20)],
)
def test_rows_and_columns_that_meet_are_the_same(family: str, shape: Shape) -> None:
    """Every number of a matrix tells its place: in a layer row + column / 64, elsewhere the column alone."""
    model = masked_lm(family)
    with torch.no_grad():
        for parameter in model.parameters():
            place = torch.arange(parameter.shape[0]).float()
            if parameter.ndim == 2:
                place = place[:, None] + torch.arange(parameter.shape[1]) / 64
            parameter.copy_(place)
        words = model.get_input_embeddings().weight
        words.copy_(torch.randn_like(words) * (torch.arange(16) % 3 + 1))  # some dimensions vary more
    config, weights = start(model, shape)
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    hidden = weights[
        name_of(weights, "LayerNorm.bias" if family == "distilbert" else "embeddings.LayerNorm.bias")
    ]
    kept_words = words[:, hidden.long()]
    assert torch.equal(weights[name_of(weights, "word_embeddings.weight")], kept_words)
    for number in range(len(LAYERS)):
        matrices, vectors = layer(config, weights, number)
        inner = [rows(matrices.pop(path)) for path in family_of(config).projections]
        assert all(torch.equal(one[0], inner[0][0]) and torch.equal(one[1], hidden) for one in inner)
        output = next(m for m in matrices.values() if m.shape == (width, width))
        assert torch.equal(rows(output)[1], inner[0][0])
        assert torch.equal(rows(output)[0], hidden)
        heads = inner[0][0].long() // 4  # the teacher has 4 heads of 4 dimensions
        assert [len(set(part.tolist())) for part in heads.split(size)] == [1] * config.num_attention_heads
        (first,) = (m for m in matrices.values() if m.shape[0] > width)
        (second,) = (m for m in matrices.values() if m.shape[1] > width)
        neurons = rows(first)[0]
        assert torch.equal(rows(second)[1], neurons)
        for path, vector in vectors.items():
            expected = {len(neurons): neurons, width: hidden}[len(vector)]
            expected = inner[0][0] if path in family_of(config).projections else expected
            assert torch.equal(vector, expected), path


def name_of(weights: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in weights if name.endswith(end))


def layer(
    config: Any, weights: dict[str, torch.Tensor], number: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Matrices and vectors of a layer by their modules' paths."""
    family = family_of(config)
    start = f"{family.prefix}.{family.layers}.{number}."
    own = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
    matrices = {n.rpartition(".")[0]: w for n, w in own.items() if w.ndim == 2}
    return matrices, {n.rpartition(".")[0]: w for n, w in own.items() if w.ndim == 1 and "bias" in n}


def rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's rows and columns that a matrix is made of."""
    row = matrix[:, 0].floor()
    return row, (matrix[0] - row[0]) * 64


def test_joint_projections_and_gated_neurons() -> None:
    """ModernBERT: one matrix of queries, keys and values, and one of neurons and their gates."""
    model = masked_lm("modernbert")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            place = torch.arange(parameter.shape[0]).float()
            parameter.copy_(
                place[:, None] + torch.arange(parameter.shape[1]) / 64 if parameter.ndim == 2 else place
            )
    config, weights = start(model, Shape(hidden_size=8))
    for number in range(len(LAYERS)):
        matrices, _ = layer(config, weights, number)
        joint, hidden = rows(matrices["attn.Wqkv"])
        inner = torch.tensor([0, 2, 4, 6, 8, 10, 12, 14.0])  # of 4 heads, of 4 dimensions, 1 of 2 pairs
        assert torch.equal(joint, torch.cat([inner, inner + 16, inner + 32]))
        assert torch.equal(rows(matrices["attn.Wo"])[1], inner)
        assert torch.equal(rows(matrices["attn.Wo"])[0], hidden)
        neurons = rows(matrices["mlp.Wo"])[1]
        assert len(neurons) == 12
        assert torch.equal(rows(matrices["mlp.Wi"])[0], torch.cat([neurons, neurons + 24]))


def test_rotary_pairs_keep_their_frequencies() -> None:
    """Of 8 dimensions, pairs 0 and 2: base^(-2 i / 8) for i of 0, 2 is base^(-2 j / 4) for j of 0, 1."""
    kept = _rotary_dimensions(torch.rand(16), 2, 2, 8)
    assert kept.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    size = torch.tensor([0.0] * 8 + [1.0] * 8)
    assert _rotary_dimensions(size, 2, 1, 8).tolist() == list(range(8, 16))  # a whole head


def test_what_cannot_be_sliced_is_one_line() -> None:
    refused = "2 heads of 6 dimensions cannot be cut out of the teacher's 4 heads of 4"
    for family in ("bert", "modernbert"):
        model = masked_lm(family)
        config = student_config(model.config, LAYERS, Shape(hidden_size=12, attention_heads=2))
        with pytest.raises(UserError, match=refused):
            starting_weights(config, model.config, named_weights(model), LAYERS)
