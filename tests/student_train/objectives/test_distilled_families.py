"""The loss of a student of every family, from stored states, against a dense formula with its live teacher.

The oracle is float64, and computes each sequence alone, without padding.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from infra.settings.sections import Student, Train
from offline_teacher.families import family_of
from offline_teacher.models.recording import QueriesKeysValues
from offline_teacher.models.replay import Replay
from offline_teacher.models.split import lower_part
from offline_teacher.models.weights import top_weights
from offline_teacher.store.schema import Layout
from student_train.data.collate import Batch, collate
from student_train.objectives.objective import Objective
from student_train.student.model import StudentModel, build_student
from tests.benchmarks.live_reference import dense_relation_loss
from tests.offline_teacher.families.tiny_models import FAMILIES, batch, masked_lm

TRAIN = Train(
    batch_size=3, micro_batch_size=3, dtype="float32", compile=False, alpha_relation=3.0, relation_heads=4
)
MASKED = np.array([[2, 5], [1, 3], [-1, -1]], np.int16)
LABELS = np.array([[7, 9], [11, 6], [0, 0]])
TOLERANCE = 5e-3
"""States are stored in float16, good to 2^-11; a layer and the softmax make it a few times that."""


def stored(teacher: Any, n: int, ids: Tensor, count: Tensor) -> Batch:
    """Returns the columns that a teacher pass would have stored for these ids."""
    states = lower_part(copy.deepcopy(teacher), n).double()(ids, count).half()
    columns = {
        "input_ids": ids.numpy(),
        "token_count": count.numpy(),
        "masked_positions": MASKED[: len(ids)],
        "masked_labels": LABELS[: len(ids)],
        "hidden_states": states.numpy(),
    }
    return collate(columns, masked_only=False, bfloat16=False, weight=1.0)


def student_of(teacher: Any) -> StudentModel:
    """Returns a student of one layer, far from the teacher."""
    model = build_student(Student(layers=(0,), init="random"), TRAIN, teacher.config.to_dict(), None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def seen(model: Any, ids: Tensor, layer: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns last hidden states [L, D], logits [L, V], and queries, keys and values [1, L, D] of one
    sequence."""
    last: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _, __, out: last.append(out[0]))
    with QueriesKeysValues(model, layer) as recorder:
        logits = model(input_ids=ids[None]).logits
        projected = list(recorder.take())
    hook.remove()
    return last[0][0], logits[0], projected


def dense_loss(teacher: Any, student: nn.Module, n: int, ids: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Computes each term by its formula, as a mean over all tokens without padding or all masked tokens."""
    sums: dict[str, Tensor] = {"kl": torch.zeros(()), "mlm": torch.zeros(()), "cosine": torch.zeros(())}
    sums["relation"] = torch.zeros(())
    for row, real in enumerate(count.tolist()):
        with torch.no_grad():
            t_last, t_logits, t_projected = seen(teacher, ids[row, :real], -n)
        s_last, s_logits, s_projected = seen(student, ids[row, :real], -1)
        p, q = (torch.log_softmax(logits / TRAIN.temperature, -1) for logits in (t_logits, s_logits))
        sums["kl"] = sums["kl"] + (p.exp() * (p - q)).sum()
        sums["cosine"] = sums["cosine"] + (1 - functional.cosine_similarity(s_last, t_last)).sum()
        masked = torch.tensor(MASKED[row][MASKED[row] >= 0].astype(np.int64))
        labels = torch.tensor(LABELS[row][: len(masked)])
        sums["mlm"] = sums["mlm"] - torch.log_softmax(s_logits, -1)[masked, labels].sum()
        relation = dense_relation_loss(s_projected, t_projected, torch.tensor([real]), heads=4)
        sums["relation"] = sums["relation"] + relation * real
    terms = {name: value / count.sum() for name, value in sums.items()}
    terms["mlm"] = sums["mlm"] / int((MASKED[: len(ids)] >= 0).sum())
    weights = {"kl": TRAIN.alpha_ce * TRAIN.temperature**2, "mlm": TRAIN.alpha_mlm}
    weights |= {"cosine": TRAIN.alpha_cos, "relation": TRAIN.alpha_relation}
    return {**terms, "loss": sum((weights[name] * value for name, value in terms.items()), torch.zeros(()))}


def check(teacher: Any, n: int, ids: Tensor, count: Tensor) -> None:
    model = student_of(teacher)
    vocabulary, width = teacher.config.vocab_size, teacher.config.hidden_size
    length, masked = ids.shape[1], MASKED.shape[1]
    layout = Layout(length, masked, vocabulary, width, 0, (), "float16", "all", replay_layers=n)
    replay = Replay(teacher.config.to_dict(), top_weights(teacher, n), n)
    objective = Objective(TRAIN, layout, replay)
    batch_of_store = stored(teacher, n, ids, count)
    terms = objective(model, batch_of_store, batch_of_store.tokens, batch_of_store.masked)
    terms.total.backward()
    oracle = copy.deepcopy(model.model).double()
    oracle.zero_grad()
    expected = dense_loss(copy.deepcopy(teacher).double(), oracle, n, ids, count)
    expected["loss"].backward()
    for name in ("kl", "mlm", "cosine", "relation"):
        found = float(getattr(terms, name).detach())
        assert found == pytest.approx(float(expected[name].detach()), rel=TOLERANCE), name
    assert float(terms.total.detach()) == pytest.approx(float(expected["loss"].detach()), rel=TOLERANCE)
    pairs = [(p.grad, q.grad) for p, q in zip(model.model.parameters(), oracle.parameters(), strict=True)]
    assert all((ours is None) == (theirs is None) for ours, theirs in pairs)
    both = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    difference = sum(float((ours - theirs).square().sum()) for ours, theirs in both)
    assert difference <= TOLERANCE**2 * sum(float(theirs.square().sum()) for _, theirs in both)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_distilled_as_with_its_live_teacher(family: str, n: int) -> None:
    check(masked_lm(family), n, *batch())


@pytest.mark.parametrize("family", FAMILIES)
def test_relations_alone_need_no_more_than_the_projections_of_their_layer(family: str) -> None:
    """The layer's own attention is not run, and the result equals that of a whole forward."""
    model, (ids, count) = StudentModel(masked_lm(family), teacher_width=16, compares=False), batch()
    layers = model.model.base_model.get_submodule(family_of(model.model.config).layers)
    for number, layer in enumerate(layers):
        _, expected = model.body_and_queries_keys_values(ids, count, number)
        hook = layer.register_forward_hook(lambda *_: pytest.fail("the whole layer was run"))
        for place in (number, number - len(layers)):
            torch.testing.assert_close(model.queries_keys_values(ids, count, place), expected)
        hook.remove()


@pytest.mark.parametrize(("family", "vocabulary"), [("xlm-roberta", 250_002), ("modernbert", 50_368)])
def test_large_vocabularies(family: str, vocabulary: int) -> None:
    check(masked_lm(family, vocab_size=vocabulary), 1, *batch(rows=(14, 9), vocabulary=vocabulary))
