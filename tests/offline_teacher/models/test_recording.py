"""Q, K and V out of a student's own forward: what the projections gave, with gradients, compiled or not."""

from __future__ import annotations

import pytest
import torch

from offline_teacher.models.recording import QueriesKeysValues
from offline_teacher.models.split import encoder_mask
from offline_teacher.models.students import new_student, student_config
from tests.offline_teacher.families.tiny_models import FAMILIES, batch, masked_lm, oracle


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_are_the_projections_of_the_forward(family: str, layer: int) -> None:
    model = masked_lm(family)
    ids, count = batch()
    expected = oracle(model, ids, count).projected[layer]
    model = model.double()
    recorder = QueriesKeysValues(model, layer)
    mask = encoder_mask(model.config, count, ids.shape[1], ids.device, torch.float64)
    real = torch.arange(ids.shape[1]) < count[:, None]
    for _ in range(2):  # every forward anew
        model.base_model(input_ids=ids, attention_mask=mask)
        for ours, theirs in zip(recorder.take(), expected, strict=True):
            torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradients_reach_the_projections_and_what_is_below(family: str) -> None:
    student = new_student(student_config(masked_lm(family).config, (0, 1)), None, head=False)
    ids, _ = batch(rows=(14, 14))
    recorder = QueriesKeysValues(student, 1)
    student(input_ids=ids)
    q, k, v = recorder.take()
    ((q @ k.transpose(1, 2)).sum() + (v**2).sum()).backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    projections = ("layer.1.attention.q_lin.weight", "layers.1.attn.Wqkv.weight")
    assert any(name.endswith(projections) for name in reached)
    assert any("layer.0." in name or "layers.0." in name for name in reached)
    assert not any("layer.1.ffn" in name or "layers.1.mlp" in name for name in reached), "nor above"


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_compiled_model_is_one_graph_and_records(family: str) -> None:
    student = new_student(student_config(masked_lm(family).config, (0, 1), dropout=0.0), None, head=False)
    ids, count = batch()
    mask = encoder_mask(student.config, count, ids.shape[1], ids.device, torch.float32)
    recorder = QueriesKeysValues(student)

    def body(ids: torch.Tensor) -> torch.Tensor:
        return student(input_ids=ids, attention_mask=mask).last_hidden_state

    compiled = torch.compile(body, backend="eager", fullgraph=True)
    for seed in (0, 1):
        ids = ids.roll(seed, 1)
        expected = body(ids), recorder.take()
        found = compiled(ids), recorder.take()
        torch.testing.assert_close(found, expected)


def test_nothing_is_handed_out_twice_and_hooks_come_off() -> None:
    model = masked_lm("bert")
    ids, _ = batch(rows=(14, 14))
    with QueriesKeysValues(model) as recorder:
        model(input_ids=ids)
        recorder.take()
        with pytest.raises(AssertionError, match="no forward pass"):
            recorder.take()
    model(input_ids=ids)
    with pytest.raises(AssertionError, match="no forward pass"):
        recorder.take()
