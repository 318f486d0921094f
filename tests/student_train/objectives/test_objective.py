"""The loss of a micro-batch from the store, against the live teacher's dense formula on the same batch."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM

from infra.errors import UserError
from infra.settings.sections import SOFT_TARGETS, Train
from offline_teacher.models.recording import QueriesKeysValues
from offline_teacher.store.store import Store
from student_train.data.loss_needs import checked_soft_target_kind
from student_train.data.order import dropout_seed
from student_train.objectives.validation import validate
from tests.benchmarks.live_reference import dense_inputs, dense_relation_loss
from tests.student_train.objectives.from_stores import (
    ALONE,
    RELATIONS,
    distance,
    from_store,
    gradients,
    live,
    objective_of,
    student_of,
    train_of,
    whole_step,
)


@pytest.mark.parametrize(
    ("layout", "changes", "tolerance"),
    [
        ({}, {}, 2e-3),
        ({"replay_layers": 1}, {}, 2e-3),
        ({"replay_layers": 2}, {}, 2e-3),
        ({"hidden_states": "int8"}, {}, 3e-2),
        ({"hidden_states": "int8", "replay_layers": 1}, {}, 6e-2),
        ({"hidden_states": "bfloat16", "replay_layers": 1}, {}, 2e-2),
        ({"top_k": 0}, {"alpha_mlm": 0.0}, 2e-3),
        ({}, {"alpha_cos": 0.0}, 2e-3),
    ],
)
def test_exact_loss_and_gradient_are_the_live_teachers(
    teacher: BertForMaskedLM,
    stores: typing.Callable[..., Store],
    layout: dict[str, Any],
    changes: dict[str, float],
    tolerance: float,
) -> None:
    store, train = stores(**layout), train_of(**changes)
    model = student_of(teacher, train)
    step = whole_step(store, train)
    assert len(step.micro_batches) == 4
    ours, our_gradients = from_store(objective_of(store, model, train), model, step)
    alphas = train.alpha_ce, train.alpha_mlm, train.alpha_cos
    theirs, their_gradients = live(teacher, model, step, alphas)
    for name, value in theirs.items():
        if getattr(train, {"kl": "alpha_ce", "mlm": "alpha_mlm", "cosine": "alpha_cos"}.get(name, "epochs")):
            assert ours[name] == pytest.approx(value, rel=tolerance), name
    assert distance(our_gradients, their_gradients) < tolerance


@pytest.mark.parametrize(
    ("layout", "chosen", "layer", "tolerance"),
    [
        ({"replay_layers": 1}, None, 1, 4e-3),
        ({"replay_layers": 2}, None, 0, 4e-3),
        ({"replay_layers": 2}, -1, 1, 4e-3),
        ({"replay_layers": 2}, -2, 0, 4e-3),
        ({"replay_layers": 1, "hidden_states": "int8"}, None, 1, 1e-1),
    ],
)
def test_relations_are_those_of_the_live_teachers_layer(
    teacher: BertForMaskedLM,
    stores: typing.Callable[..., Store],
    layout: dict[str, Any],
    chosen: int | None,
    layer: int,
    tolerance: float,
) -> None:
    """Value and gradient equal the paper's formula in float64, for the chosen or lowest replayed layer."""
    store = stores(**layout)
    train = train_of(**RELATIONS, relation_heads=4, relation_teacher_layer=chosen)
    model = student_of(teacher, train)
    step = whole_step(store, train)
    ours, our_gradients = from_store(objective_of(store, model, train), model, step)
    assert ours["loss"] == ours["relation"]
    model.zero_grad()
    ids, mask, _ = (torch.cat(x) for x in zip(*map(dense_inputs, step.micro_batches), strict=True))
    with QueriesKeysValues(teacher, layer) as recorder, torch.no_grad():
        teacher(input_ids=ids, attention_mask=mask)
        expected = [x.double() for x in recorder.take()]
    with QueriesKeysValues(model.model) as recorder:
        model.model(input_ids=ids, attention_mask=mask)
        found = [x.double() for x in recorder.take()]
    oracle = dense_relation_loss(found, expected, mask.sum(1), heads=4)
    oracle.backward()
    assert ours["relation"] == pytest.approx(float(oracle.detach()), rel=tolerance)
    assert distance(our_gradients, gradients(model)) < tolerance


def test_relations_are_weighed_and_left_out(
    teacher: BertForMaskedLM, stores: typing.Callable[..., Store]
) -> None:
    """Parameters that only a left-out relation needs get no gradient."""
    store, found = stores(replay_layers=1), {}
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 3.0, 0.0)):
        train = train_of(**RELATIONS, relation_weights=weights)
        model = student_of(teacher, train)
        terms, _ = from_store(objective_of(store, model, train), model, whole_step(store, train))
        found[weights] = terms["relation"]
        attention = model.model.transformer.layer[0].attention
        reached = [
            linear.weight.grad is not None for linear in (attention.q_lin, attention.k_lin, attention.v_lin)
        ]
        assert reached == [weight > 0 for weight in weights]
    queries, keys, _, mixed = found.values()
    assert mixed == pytest.approx((queries + 3 * keys) / 4, rel=1e-5)


def test_all_terms_together_add_up(teacher: BertForMaskedLM, stores: typing.Callable[..., Store]) -> None:
    store, train = stores(replay_layers=1), train_of(alpha_relation=3.0)
    model = student_of(teacher, train)
    terms, _ = from_store(objective_of(store, model, train), model, whole_step(store, train))
    weighted = 5 * 2**2 * terms["kl"] + 2 * terms["mlm"] + terms["cosine"] + 3 * terms["relation"]
    assert terms["loss"] == pytest.approx(weighted, rel=1e-5)
    assert min(value for name, value in terms.items() if name != "embedding") > 0


def test_topk_loss_is_below_the_exact_one_and_close(
    teacher: BertForMaskedLM, stores: typing.Callable[..., Store]
) -> None:
    """Merging the tail into one bucket can only reduce KL (data processing inequality)."""
    store, kl = stores(), []
    for kind in ("exact", "topk"):
        train = train_of(soft_targets=kind)
        model = student_of(teacher, train)
        terms, _ = from_store(objective_of(store, model, train), model, whole_step(store, train))
        kl.append(terms["kl"])
    assert 0 < kl[1] < kl[0]


@pytest.mark.parametrize("kind", ["exact", "topk"])
def test_masked_stores_give_the_masked_loss_of_full_ones(
    teacher: BertForMaskedLM, stores: typing.Callable[..., Store], kind: str
) -> None:
    train = train_of(kl_positions="masked", alpha_cos=0.0, soft_targets=kind)
    model = student_of(teacher, train)
    found = []
    for positions in ("all", "masked"):
        store = stores(positions=positions)
        found.append(from_store(objective_of(store, model, train), model, whole_step(store, train)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert distance(found[1][1], found[0][1]) < 1e-5


def test_text_that_is_not_masked(teacher: BertForMaskedLM, stores: typing.Callable[..., Store]) -> None:
    store, train = stores(masked=0), train_of(alpha_mlm=0.0)
    model = student_of(teacher, train)
    step = whole_step(store, train)
    ours, our_gradients = from_store(objective_of(store, model, train), model, step)
    theirs, their_gradients = live(teacher, model, step, (5.0, 0.0, 1.0))
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=2e-3)
    assert ours["mlm"] == 0.0
    assert distance(our_gradients, their_gradients) < 2e-3
    metrics = validate(model, objective_of(store, model, train), store, ALONE, train)
    assert set(metrics) == {"kl_t1", "kl_t2", "cosine"}


def test_auto_prefers_exact(stores: typing.Callable[..., Store]) -> None:
    train, layout = train_of(), stores().layout
    assert checked_soft_target_kind(train, layout) == "exact"
    no_hidden = dataclasses.replace(layout, hidden_states="none")
    assert checked_soft_target_kind(dataclasses.replace(train, alpha_cos=0.0), no_hidden) == "topk"
    assert checked_soft_target_kind(dataclasses.replace(train, alpha_ce=0.0), layout) is None
    with pytest.raises(UserError, match="hidden states"):
        checked_soft_target_kind(train, no_hidden)


def test_dropout_seeds_differ_by_seed_step_and_rank() -> None:
    seeds = {dropout_seed(seed, step, rank) for seed in range(3) for step in range(5) for rank in range(4)}
    assert len(seeds) == 60
    assert dropout_seed(1, 2, 3) == dropout_seed(1, 2, 3)


def test_every_kind_of_soft_target_has_its_needs() -> None:
    kinds = set(typing.get_args(typing.get_type_hints(Train)["soft_targets"])) - {"auto"}
    assert kinds == set(SOFT_TARGETS)
