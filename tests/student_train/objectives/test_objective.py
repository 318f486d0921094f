"""The loss of a micro-batch from the store, against the live teacher's dense formula on the same batch."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForMaskedLM

from infra.errors import UserError
from infra.settings.sections import SOFT_TARGETS, Student, Train
from offline_teacher.models.recording import QueriesKeysValues
from offline_teacher.models.replay import Replay
from offline_teacher.store.reader import Store
from student_train.data.order import SampleOrder, dropout_seed
from student_train.data.reading import open_stream
from student_train.data.stream import Step
from student_train.engine.world import World
from student_train.objectives import triple_loss
from student_train.objectives.needs import columns_needed, soft_target_kind
from student_train.objectives.objective import TERMS, Objective
from student_train.objectives.relations import dense_relation_loss
from student_train.objectives.soft_targets import ExactTarget
from student_train.objectives.validation import validate
from student_train.objectives.vocabulary_kernels import exact_kernel, mlm_kernel
from student_train.student.model import StudentModel, build_student
from tests.benchmarks.live_reference import dense_inputs, live_loss
from tests.student_train.tiny_run import make_store, make_teacher
from tests.waits import Waits

SEQUENCES = 20
RELATIONS = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0, "alpha_relation": 1.0}


class Alone(World):
    def sum(self, values: list[float]) -> list[float]:
        return values

    def raise_first(self, problem: str) -> None:
        assert not problem


ALONE = Alone(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher() -> BertForMaskedLM:
    return make_teacher()


@pytest.fixture(scope="module")
def stores(teacher: BertForMaskedLM, tmp_path_factory: pytest.TempPathFactory) -> typing.Callable[..., Store]:
    root, made = tmp_path_factory.mktemp("stores"), {}

    def store_of(**layout: Any) -> Store:
        """Of 20 sequences in each split; made once."""
        name = "-".join(f"{key}{value}" for key, value in layout.items()) or "plain"
        if name not in made:
            path: Path = root / name
            made[name] = make_store(
                path, teacher, sequences=SEQUENCES, held_out=SEQUENCES, masking_epochs=1, **layout
            )
        return made[name]

    return store_of


def train_of(**changes: Any) -> Train:
    settings = {"batch_size": SEQUENCES, "micro_batch_size": 5, "dtype": "float32", "compile": False}
    return Train(**{**settings, **changes})


def student_of(teacher: BertForMaskedLM, train: Train) -> StudentModel:
    student = Student(layers=(0,), init="random")
    model = build_student(student, train, teacher.config.to_dict(), None)
    with torch.no_grad():  # far from the teacher, so that every term counts
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def objective_of(store: Store, model: StudentModel, train: Train) -> Objective:
    layout, replay = store.layout, None
    if layout.hidden_states != "none":
        replay = Replay(store.teacher_config(), load_file(store.teacher_weights()), layout.replay_layers)
    recorder = model.recorder(train.relation_layer) if train.alpha_relation else None
    return Objective(train, layout, replay, recorder)


def whole_step(store: Store, train: Train) -> Step:
    """All sequences of the store as one optimiser step of several micro-batches."""
    order = SampleOrder(store.splits["train"].plan, 0, SEQUENCES, SEQUENCES, 2)
    with open_stream(store, "train", columns_needed(train, store.layout), order, train, ALONE) as stream:
        return next(stream)


def from_store(
    objective: Objective, model: StudentModel, step: Step
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Terms and gradients of the step, added up over its micro-batches."""
    model.zero_grad()
    sums = dict.fromkeys(TERMS, 0.0)
    for batch in step.micro_batches:
        terms = objective(model, batch, step.tokens, step.masked)
        terms.total.backward()
        for name, value in zip(TERMS, terms.values(), strict=True):
            sums[name] += float(value.detach())
    return sums, gradients(model)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def live(
    teacher: BertForMaskedLM, model: StudentModel, step: Step, alphas: tuple[float, float, float]
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The same by the dense formula on the whole batch at once."""
    model.zero_grad()
    parts = zip(*(dense_inputs(batch) for batch in step.micro_batches), strict=True)
    terms = live_loss(teacher, model.model, *(torch.cat(part) for part in parts), alphas=alphas)
    terms["loss"].backward()
    return {name: float(value.detach()) for name, value in terms.items()}, gradients(model)


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of the gradients, over the size of the expected one."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return (difference / sum(float(b.square().sum()) for b in expected)) ** 0.5


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
    ("layout", "tolerance"),
    [
        ({"replay_layers": 1}, 4e-3),
        ({"replay_layers": 2}, 4e-3),
        ({"replay_layers": 1, "hidden_states": "int8"}, 1e-1),
    ],
)
def test_relations_are_those_of_the_live_teachers_layer(
    teacher: BertForMaskedLM, stores: typing.Callable[..., Store], layout: dict[str, Any], tolerance: float
) -> None:
    """Of the deepest replayed layer, in value and gradient, by the paper's formula in float64."""
    store, train = stores(**layout), train_of(**RELATIONS, relation_heads=4)
    model = student_of(teacher, train)
    step = whole_step(store, train)
    ours, our_gradients = from_store(objective_of(store, model, train), model, step)
    assert ours["loss"] == ours["relation"]
    model.zero_grad()
    ids, mask, _ = (torch.cat(x) for x in zip(*map(dense_inputs, step.micro_batches), strict=True))
    with QueriesKeysValues(teacher, 2 - layout["replay_layers"]) as recorder, torch.no_grad():
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
    """What only a relation that is left out needs gets no gradient."""
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
    """Merging the tail into one bucket can only lose divergence (data processing inequality)."""
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


@pytest.mark.parametrize(
    ("changes", "exact", "mlm"),
    [
        ({}, "tokens", 0),
        ({"alpha_ce": 0.0}, 0, "masked"),
        ({"kl_positions": "masked"}, "masked", 0),
        ({"alpha_ce": 0.0, "alpha_mlm": 0.0}, 0, 0),
    ],
)
def test_positions_that_no_term_looks_at_cost_nothing(
    teacher: BertForMaskedLM,
    stores: typing.Callable[..., Store],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    exact: str | int,
    mlm: str | int,
) -> None:
    seen = {"exact": 0, "mlm": 0}

    def counted(name: str, kernel: Any) -> Any:
        def run(s: torch.Tensor, *arguments: Any) -> Any:
            seen[name] += len(s)
            return kernel(s, *arguments)

        return run

    monkeypatch.setitem(triple_loss.KERNEL_SIZE, "cpu", 1)
    monkeypatch.setattr(ExactTarget, "kernel", staticmethod(counted("exact", exact_kernel)))
    monkeypatch.setattr(triple_loss, "mlm_kernel", counted("mlm", mlm_kernel))
    store, train = stores(), train_of(**changes)
    model, step = student_of(teacher, train), whole_step(store, train)
    from_store(objective_of(store, model, train), model, step)
    counts = {"tokens": step.tokens, "masked": step.masked, 0: 0}
    assert seen == {"exact": counts[exact], "mlm": counts[mlm]}


@pytest.mark.parametrize(
    ("changes", "unused"),
    [
        (RELATIONS, "last_hidden"),
        ({}, "queries_keys_values"),
        ({"soft_targets": "topk", "alpha_cos": 0.0}, "last_hidden"),
    ],
)
def test_no_more_is_replayed_than_the_loss_needs(
    teacher: BertForMaskedLM,
    stores: typing.Callable[..., Store],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    unused: str,
) -> None:
    store, train = stores(replay_layers=1), train_of(**changes)
    model = student_of(teacher, train)
    monkeypatch.setattr(Replay, unused, lambda *_: pytest.fail(f"{unused} was replayed"))
    monkeypatch.setattr(
        Replay, "last_hidden_and_queries_keys_values", lambda *_: pytest.fail("both were replayed")
    )
    terms, _ = from_store(objective_of(store, model, train), model, whole_step(store, train))
    assert terms["loss"] > 0


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alpha_ce": 0.0},
        {"kl_positions": "masked"},
        {"soft_targets": "topk", "alpha_cos": 0.0},
        RELATIONS,
        {"alpha_relation": 1.0},
    ],
)
def test_no_micro_batch_waits_for_its_host(
    teacher: BertForMaskedLM, stores: typing.Callable[..., Store], changes: dict[str, Any], full: bool
) -> None:
    """Forward, loss and gradient read nothing back: positions and labels were worked out in collation."""
    store, train = stores(replay_layers=1), train_of(micro_batch_size=1, **changes)
    model = student_of(teacher, train)  # without dropout, whose kernel on a CPU draws its seed on the host
    objective, step = objective_of(store, model, train), whole_step(store, train)
    batch = next(batch for batch in step.micro_batches if batch.full == full)
    with Waits() as waits:
        objective(model, batch, step.tokens, step.masked).total.backward()
    assert waits.seen == []


def test_auto_prefers_exact(stores: typing.Callable[..., Store]) -> None:
    train, layout = train_of(), stores().layout
    assert soft_target_kind(train, layout) == "exact"
    no_hidden = dataclasses.replace(layout, hidden_states="none")
    assert soft_target_kind(dataclasses.replace(train, alpha_cos=0.0), no_hidden) == "topk"
    assert soft_target_kind(dataclasses.replace(train, alpha_ce=0.0), layout) is None
    with pytest.raises(UserError, match="hidden states"):
        soft_target_kind(train, no_hidden)


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
    """K = V: nothing is left for the bucket, so the measures are those of the whole distribution."""
    train = train_of(alpha_cos=0.0)
    model = student_of(teacher, train)
    found = []
    for layout in ({"hidden_states": "none", "top_k": 96}, {}):
        store = stores(**layout)
        found.append(validate(model, objective_of(store, model, train), store, ALONE, train))
    assert found[0].keys() == found[1].keys() - {"teacher_mlm_loss"}
    assert found[0] == pytest.approx({name: found[1][name] for name in found[0]}, rel=5e-3)


def test_dropout_seeds_differ_by_seed_step_and_rank() -> None:
    seeds = {dropout_seed(seed, step, rank) for seed in range(3) for step in range(5) for rank in range(4)}
    assert len(seeds) == 60
    assert dropout_seed(1, 2, 3) == dropout_seed(1, 2, 3)


def test_every_kind_of_soft_target_has_its_needs() -> None:
    kinds = set(typing.get_args(typing.get_type_hints(Train)["soft_targets"])) - {"auto"}
    assert kinds == set(SOFT_TARGETS)
