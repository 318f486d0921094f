"""Measures on held-out text against the live teacher and against stored top-k."""

from __future__ import annotations

import typing

import pytest
import torch
from transformers import BertForMaskedLM

from offline_teacher.store.store import Store
from student_train.data.order import SampleOrder
from student_train.data.reading import open_stream
from student_train.objectives.validation import validate
from tests.benchmarks.live_reference import dense_inputs
from tests.student_train.objectives.from_stores import (
    ALONE,
    SEQUENCES,
    objective_of,
    student_of,
    train_of,
)


@pytest.mark.parametrize("replay_layers", [0, 1])
def test_validation_against_the_live_teacher(
    teacher: BertForMaskedLM, stores: typing.Callable[..., Store], replay_layers: int
) -> None:
    store, train = stores(replay_layers=replay_layers), train_of()
    model = student_of(teacher, train)
    metrics = validate(model, objective_of(store, model, train), store, ALONE, train)
    assert not model.training
    order = SampleOrder(store.splits["validation"].plan, 0, SEQUENCES, SEQUENCES, 2)
    with open_stream(store, "validation", [], order, train, ALONE) as stream:
        parts = [dense_inputs(batch) for batch in next(stream).micro_batches]
    ids, mask, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    real, masked = mask.bool(), labels >= 0
    with torch.no_grad():
        s, t = (m(input_ids=ids, attention_mask=mask).logits.double() for m in (model.model, teacher))
    for temperature in (1.0, 2.0):
        p, q = (torch.log_softmax(x[real] / temperature, -1) for x in (t, s))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert metrics[f"kl_t{temperature:g}"] == pytest.approx(kl, rel=2e-3)
    best = s[masked].argmax(-1)
    losses = {
        name: float(torch.nn.functional.cross_entropy(x[masked], labels[masked]))
        for name, x in (("mlm_loss", s), ("teacher_mlm_loss", t))
    }
    assert {name: metrics[name] for name in losses} == pytest.approx(losses, rel=2e-3)
    assert metrics["agreement"] == pytest.approx(float((best == t[masked].argmax(-1)).double().mean()))
    assert metrics["mlm_accuracy"] == pytest.approx(float((best == labels[masked]).double().mean()))


def test_validation_by_the_stored_top_k(
    teacher: BertForMaskedLM, stores: typing.Callable[..., Store]
) -> None:
    """With K = V the bucket is empty, so the measures are those of the whole distribution."""
    train = train_of(alpha_cos=0.0)
    model = student_of(teacher, train)
    found = []
    for layout in ({"hidden_states": "none", "top_k": 96}, {}):
        store = stores(**layout)
        found.append(validate(model, objective_of(store, model, train), store, ALONE, train))
    assert found[0].keys() == found[1].keys() - {"teacher_mlm_loss"}
    assert found[0] == pytest.approx({name: found[1][name] for name in found[0]}, rel=5e-3)
