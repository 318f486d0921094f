"""Phases on further stores: their samples, interruptions in and between them, and stores that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from infra.errors import UserError
from offline_teacher.store.store import open_store
from student_train.data.phases import Phases
from student_train.data.stream import Step
from student_train.engine.learning_rate import learning_rate
from student_train.engine.world import World
from student_train.trainer import Trainer
from tests.student_train.tiny_run import (
    L,
    V,
    command,
    logged,
    make_phased_run,
    make_store,
    make_teacher,
    student,
    weights,
)

STEPS, MORE = 4, 3
TEACHER: dict[str, Any] = {"max_position_embeddings": 2 * L + 4}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phased")
    make_phased_run(root, steps=STEPS, more=MORE, checkpoint_every=1)
    return root


@pytest.fixture
def phased(original: Path, tmp_path: Path) -> Path:
    root = tmp_path / "run"
    shutil.copytree(original, root)
    recipe = root / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(original), str(root)))
    return root


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(step, length) of every micro-batch that was trained on."""
    seen: list[tuple[int, int]] = []
    forward = Trainer._forward_backward

    def watched(self: Trainer, step: Any, tokens: float, masked: float) -> torch.Tensor:
        seen.extend((step.number, batch.input_ids.shape[1]) for batch in step.micro_batches)
        return forward(self, step, tokens, masked)

    monkeypatch.setattr(Trainer, "_forward_backward", watched)
    return seen


def settings(root: Path, **train: Any) -> None:
    """Changes settings of the recipe."""
    path = root / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["train"].update(train)
    path.write_text(yaml.safe_dump(recipe))


def test_each_phase_reads_its_own_store(alone: World, phased: Path, shapes: list[tuple[int, int]]) -> None:
    """Steps are numbered through, one schedule spans them, and the last phase starts its store a second
    time."""
    command(phased)
    assert sorted(set(shapes)) == [
        *((step, L) for step in range(STEPS)),
        *((step, 2 * L) for step in (4, 5, 6)),
    ]
    lines = logged(phased)
    assert [line["step"] for line in lines] == list(range(1, STEPS + MORE + 1))
    trained = command_train(phased)
    assert [line["learning_rate"] for line in lines] == [
        learning_rate(trained, step, STEPS + MORE) for step in range(STEPS + MORE)
    ]
    state = json.loads((student(phased) / "checkpoints" / "step-00000007" / "state.json").read_text())
    assert state["samples_seen"] == (STEPS + MORE) * 8


def test_each_phase_is_read_by_its_own_layout(alone: World, phased: Path) -> None:
    """The loss finds the logsumexp of its temperature at whatever index a store has it."""
    found = []
    for temperatures in ((1.0, 2.0), (0.5, 1.0, 2.0)):
        shutil.rmtree(phased / "longer")
        shutil.rmtree(student(phased), ignore_errors=True)
        sizes: dict[str, Any] = {
            "length": 2 * L,
            "sequences": 20,
            "held_out": 0,
            "masking_epochs": 1,
            "seed": 1,
        }
        make_store(phased / "longer", make_teacher(**TEACHER), **sizes, temperatures=temperatures)
        command(phased, "train.soft_targets=topk", "student.dropout=0")
        found.append([line["kl"] for line in logged(phased)])
    assert found[0] == found[1]


def command_train(root: Path) -> Any:
    from infra.settings.recipe_file import load_recipe

    return load_recipe(str(root / "recipe.yaml")).train


@pytest.mark.parametrize("at", [2, STEPS, STEPS + 1], ids=["first phase", "border", "second phase"])
def test_a_run_that_is_killed_repeats_every_bit(
    alone: World, phased: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    command(phased)
    whole, lines = weights(phased), logged(phased)
    shutil.rmtree(student(phased))
    save = Trainer.save

    def dies(self: Trainer) -> None:
        save(self)
        self.checkpoints.wait()
        if self.step == at:
            raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Trainer, "save", dies)
        command(phased)
    resumed: list[int] = []
    count = Trainer._count

    def noted(self: Trainer, step: Step, *rest: Any) -> Any:
        resumed.append(step.number)
        return count(self, step, *rest)

    monkeypatch.setattr(Trainer, "_count", noted)
    command(phased)
    assert resumed == list(range(at, STEPS + MORE))
    exact = ("step", "loss", "gradient_norm", "samples")
    assert [[line[name] for name in exact] for line in logged(phased)] == [
        [line[name] for name in exact] for line in lines
    ]
    for name, tensor in weights(phased).items():
        assert torch.equal(tensor, whole[name]), name


def test_samples_of_all_phases(phased: Path) -> None:
    stores = [open_store(str(phased / "runs/tiny/store")), open_store(str(phased / "longer"))]
    phases = Phases(stores, command_train(phased))
    assert phases.steps == STEPS + MORE
    assert [phases.at(step).first_step for step in (0, STEPS - 1, STEPS, STEPS + MORE - 1)] == [
        0,
        0,
        STEPS,
        STEPS,
    ]
    assert [phases.samples_before(step) for step in (0, 1, STEPS, STEPS + 2)] == [0, 8, 32, 48]
    last = phases.at(STEPS)
    assert last.store is stores[1]
    read = [last.locations(step) for step in range(STEPS, STEPS + MORE)]
    first_epoch = {(b, r) for locations in read for b, r in zip(locations.block, locations.row, strict=True)}
    assert len(first_epoch) == 20  # 24 samples: each of the 20, and 4 of them twice


def test_the_card_tells_of_phases(alone: World, phased: Path) -> None:
    command(phased)
    card = (student(phased) / "model" / "README.md").read_text()
    assert (
        f"The student was trained on sequences of {L} tokens, then for {MORE} steps on sequences of {2 * L},"
        f" and takes up to {2 * L + 4} tokens. Only {MORE} steps trained its position embeddings from {L} on."
        f" Its position embeddings {2 * L} to {2 * L + 3} are the teacher's: no step trained them"
    ) in card
    assert f"| store of phase 1 | {open_store(str(phased / 'longer')).digest} |" in card


def test_phases_are_part_of_what_a_student_is(alone: World, phased: Path) -> None:
    """The fingerprint contains the phases' steps and store digests, not their paths."""
    command(phased)
    (phased / "longer").rename(phased / "moved")
    settings(phased, phases=[{"store": str(phased / "moved"), "steps": MORE}])
    assert command(phased) == 0
    settings(phased, phases=[{"store": str(phased / "moved"), "steps": MORE + 1}])
    with pytest.raises(UserError, match=rf"phases.1.steps: {MORE} -> {MORE + 1}"):
        command(phased)
    settings(phased, phases=[])
    with pytest.raises(UserError, match="phases.1.store: .* -> absent"):
        command(phased)


def test_a_loss_that_is_not_finite_in_a_later_phase(
    alone: World, phased: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names samples of that phase's store."""
    forward = Trainer._forward_backward

    def poisoned(self: Trainer, step: Any, tokens: float, masked: float) -> torch.Tensor:
        terms = forward(self, step, tokens, masked)
        return terms * torch.nan if step.number == STEPS + 1 else terms

    monkeypatch.setattr(Trainer, "_forward_backward", poisoned)
    with pytest.raises(
        UserError, match=rf"step {STEPS + 1}: the loss is not .* store {phased}/longer; the last"
    ):
        command(phased)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "teacher": ({"fingerprint": {"teacher": "xxh3-128:0"}}, "was made with another teacher than"),
    "tokenizer": ({"fingerprint": {"tokenizer": "xxh3-128:0"}}, "was made with another tokenizer than"),
    "family": ({"fingerprint": {"architecture": "mpnet"}}, "was made with another architecture than"),
    "vocabulary": ({"vocab_size": V + 8}, rf"another form than .* \(vocabulary: {V} -> {V + 8}\)"),
    "replay": ({"replay_layers": 1}, r"another form than .* \(replay_layers: 0 -> 1\)"),
    "positions": ({"positions": "masked"}, "train.kl_positions: all, but the store holds masked"),
    "masks": ({"masked": 0}, "train.alpha_mlm: the text of the store is not masked"),
    "hidden states": ({"hidden_states": "none"}, "train.alpha_cos: the cosine term needs hidden states"),
}
"""How the store of the phase is made, and the words of the refusal."""


@pytest.mark.parametrize("kind", BAD)
def test_a_store_that_does_not_fit(alone: World, phased: Path, kind: str) -> None:
    """The error is one line, before any training."""
    made, words = BAD[kind]
    shutil.rmtree(phased / "longer")
    sizes = {"length": 2 * L, "held_out": 0, **made}
    vocabulary = {"vocab_size": sizes["vocab_size"]} if "vocab_size" in sizes else {}
    make_store(phased / "longer", make_teacher(**TEACHER, **vocabulary), **sizes)
    with pytest.raises(UserError, match=words) as refused:
        command(phased)
    assert "\n" not in str(refused.value)
    assert str(phased / "longer") in str(refused.value)
    assert not student(phased).exists()


def test_a_store_that_is_not_there(alone: World, phased: Path) -> None:
    shutil.rmtree(phased / "longer")
    with pytest.raises(UserError, match=f"{phased}/longer is not a store"):
        command(phased)
    assert not student(phased).exists()
