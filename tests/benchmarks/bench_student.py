"""Training rate from a store relative to running the teacher in every step, and to batches in memory.

    python tests/benchmarks/bench_student.py [half] [6x384] [3x384] [losses]    # default: all; minutes each

All sides do complete optimiser steps with the same shapes and dtype, in turn, on torch's threads. The weights
and the stored numbers are random, since they do not change the time. Two sides run the teacher in every step:

- *plain*: the formula of DistilBERT's authors, dense logits, torch's AdamW (``live_reference``);
- *same loss*: ``train.teacher: live``. The teacher's lower layers run in every step, with our loss and
  engine. The difference from this side is the time that the store saves.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from infra.cpu.processor import computes_bfloat16
from infra.settings.recipe import Recipe
from infra.settings.sections import Precision, Student, Train
from infra.tracking.run import Run
from offline_teacher.models.split import lower_part_from_weights
from offline_teacher.models.weights import named_weights, top_weights
from offline_teacher.store.schema import Layout
from student_train.data.loss_needs import required_columns
from student_train.data.order import SampleOrder
from student_train.data.reading import open_stream
from student_train.data.stream import Step, Stream
from student_train.engine.engine import Engine
from student_train.engine.world import World, start_world
from student_train.objectives import triple_loss
from student_train.student_and_loss import model_and_objective
from student_train.trainer import Trainer
from tests.benchmarks.full_sequences import full_store
from tests.benchmarks.live_reference import dense_inputs, live_optimizer, live_step
from tests.benchmarks.results import Row, record, row, rows_table
from tests.benchmarks.timing import print_round

BATCH, LENGTH, ROUNDS = 16, 128, 4
"""Sequences per step, tokens per sequence, and rounds; a warm-up round before them is not counted."""
STEPS = 2
"""Timed steps from the store per round; the first step of a stream is not timed."""
RELATIONS = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0, "alpha_relation": 1.0}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@dataclass(frozen=True)
class Case:
    """A teacher, a student and a loss."""

    title: str
    teacher: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the teacher that differ from BERT-base."""
    layers: tuple[int, ...] = (0, 2, 4, 7, 9, 11)
    width: int | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    replay_layers: int = 0


HALF = Case("BERT-base to 6 layers, triple loss")
NARROW = Case("BERT-base to 6 x 384, relations", width=384, train=RELATIONS, replay_layers=1)
NARROW_TRIPLE = Case("BERT-base to 6 x 384, triple loss", width=384)
TINY = Case("24 x 1024 to 3 x 384, relations", LARGE, (0, 12, 23), 384, RELATIONS, 1)
SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BOTH = {"alpha_relation": 10.0}
LOSSES = {
    name: Case(f"6 x 384 to 3 x {width or 384}, {name}", SMALL, (0, 2, 5), width, train, replay_layers=1)
    for name, width, train in (
        ("triple", None, {}),
        ("triple, KL at masked positions", None, {"kl_positions": "masked"}),
        ("relations", None, RELATIONS),
        ("both", None, BOTH),
        ("half width, relations", 192, RELATIONS),
        ("half width, both", 192, BOTH),
    )
}
"""Loss -> the case that trains with it. All have one teacher."""


class Training:
    """A student with the trainer's step, a store of random numbers, and a teacher of the store's
    dimensions."""

    def __init__(self, case: Case, directory: str, world: World) -> None:
        self.case, self.world = case, world
        torch.manual_seed(0)
        config = BertConfig(**case.teacher)
        self.teacher = BertForMaskedLM(config).eval()
        kept = {n: x.detach().numpy() for n, x in top_weights(self.teacher, case.replay_layers).items()}
        layout = Layout(
            length=LENGTH, masked=20, vocab_size=config.vocab_size, top_k=0, temperatures=(),
            hidden_size=config.hidden_size, hidden_states="float16", positions="all",
            replay_layers=case.replay_layers, teacher_weights=False,
        )  # fmt: skip
        sequences = BATCH * (STEPS + 1) * (ROUNDS + 1)
        self.store = full_store(directory, layout, sequences, config.to_dict(), kept)
        dtype: Precision = "bfloat16" if computes_bfloat16() else "float32"
        self.train = Train(batch_size=BATCH, micro_batch_size=BATCH, dtype=dtype, **case.train)
        student = Student(layers=case.layers, hidden_size=case.width, init="random")
        recipe = Recipe(name="bench", output=directory, student=student, train=self.train)
        self.model, objective = model_and_objective(recipe.run("student"), self.store, world)
        self.engine = Engine(self.model, self.train, world)
        self.trainer = Trainer(
            recipe.run("student"), world, [self.store], self.model, objective, self.engine, Run(), {}
        )

    def stream(self, start: int) -> Stream:
        plan = self.store.splits["train"].plan
        order = SampleOrder(plan, 0, BATCH, plan.samples_per_epoch, window_batches=2)
        columns = required_columns(self.train, self.store.layout)
        return open_stream(self.store, "train", columns, order, self.train, self.world, start=start)

    def step(self, step: Step) -> None:
        self.trainer._forward_backward(step, float(step.tokens), float(step.masked))
        self.engine.step(5e-4)

    def with_live_teacher(self) -> Callable[[Step], None]:
        """Returns the function that does a step with ``train.teacher: live``."""
        weights = named_weights(self.teacher)
        live = lower_part_from_weights(self.teacher.config, weights, self.case.replay_layers)
        live.to(self.world.device, getattr(torch, self.train.dtype))
        objective = replace(self.trainer.objective, live=live)

        def step(kept: Step) -> None:
            with mock.patch.object(self.trainer, "objective", objective):
                self.step(kept)

        return step


def run(names: Sequence[str] = ()) -> list[Row]:
    """Returns the rows of the named cases; of all cases if none is named."""
    world = start_world()
    rows: list[Row] = []
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as directory:
            rows += CASES[name](directory, world)
    world.close()
    return rows


def half_rows(directory: str, world: World) -> list[Row]:
    training = Training(HALF, directory, world)
    plain = plain_student(training)
    optimizer, bfloat16 = live_optimizer(plain), training.train.dtype == "bfloat16"

    def with_teacher(kept: Step) -> None:
        inputs = [dense_inputs(batch) for batch in kept.micro_batches]
        live_step(training.teacher, plain, optimizer, inputs, bfloat16=bfloat16)

    others = {"plain": with_teacher, "same": training.with_live_teacher()}
    seconds = rounds("student, half", [training], others)
    store, where = seconds["store0"], conditions(training, seconds)
    return [
        row(f"student.{name}", value, unit, goal, where)
        for name, value, unit, goal in (
            ("tokens_per_second", BATCH * LENGTH / store, "tokens/s", None),
            ("over_live_plain", seconds["plain"] / store, "ratio", ">= 2"),
            ("over_live_same_loss", seconds["same"] / store, "ratio", None),
            ("over_in_memory", seconds["memory0"] / store, "ratio", ">= 0.97"),
            ("input_wait", seconds["wait0"] / store, "of the time", "<= 0.01"),
            ("loss_share", seconds["loss0"] / store, "of the time", None),
        )
    ]


def narrow_rows(directory: str, world: World) -> list[Row]:
    relations = Training(NARROW, f"{directory}/relations", world)
    triple = Training(NARROW_TRIPLE, f"{directory}/triple", world)
    seconds = rounds("student, 6 x 384", [relations, triple], {"same": relations.with_live_teacher()})
    store, where = seconds["store0"], conditions(relations, seconds)
    return [
        row("student.relations_over_triple", seconds["store1"] / store, "ratio", ">= 2", where),
        row("student.over_live_same_loss_6x384", seconds["same"] / store, "ratio", None, where),
    ]


def tiny_rows(directory: str, world: World) -> list[Row]:
    training = Training(TINY, directory, world)
    seconds = rounds("student, 3 x 384", [training], {"same": training.with_live_teacher()})
    ratio, where = seconds["same"] / seconds["store0"], conditions(training, seconds)
    return [row("student.over_live_same_loss_3x384_of_large", ratio, "ratio", ">= 5", where)]


def losses_rows(directory: str, world: World) -> list[Row]:
    trainings = [Training(case, f"{directory}/{name}", world) for name, case in LOSSES.items()]
    seconds = rounds("student, losses", trainings, {})
    where = conditions(trainings[0], seconds)
    return [
        row(f"student.over_triple.{name}", seconds["store0"] / seconds[f"store{i}"], "ratio", None, where)
        for i, name in enumerate(LOSSES)
        if i  # the first is the triple loss itself
    ]


CASES = {"half": half_rows, "6x384": narrow_rows, "3x384": tiny_rows, "losses": losses_rows}


def plain_student(training: Training) -> DistilBertForMaskedLM:
    """Returns the student's architecture as transformers implements it, without our changes."""
    config = DistilBertConfig.from_dict(training.model.model.config.to_dict())
    return DistilBertForMaskedLM(config).float().train()


def rounds(
    title: str, trainings: list[Training], others: Mapping[str, Callable[[Step], None]]
) -> dict[str, float]:
    """Returns name -> median seconds per step. For training number i: ``store<i>`` with batches from the
    store, ``memory<i>`` with a batch in memory, ``wait<i>`` waiting for the store, ``loss<i>`` in the loss.
    ``others``: further functions that do a step, timed with a batch of the first training."""
    seconds: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        measured: dict[str, float] = {}
        kept: list[Step] = []
        for i, training in enumerate(trainings):
            with training.stream(number * (STEPS + 1)) as stream:
                kept.append(next(stream))  # not timed: the start of a stream is slower
                training.step(kept[i])
                measured[f"store{i}"], measured[f"wait{i}"] = from_stream(training, stream)
            measured[f"memory{i}"] = timed(training.step, *[kept[i]] * STEPS) / STEPS
            measured[f"loss{i}"] = loss_seconds(training, kept[i])
        for name, other in others.items():
            measured[name] = timed(other, kept[0])
        print_round(title, number, ROUNDS, measured)
        if number:
            for name, value in measured.items():
                seconds.setdefault(name, []).append(value)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def timed(function: Callable[[Step], object], *steps: Step) -> float:
    """Returns the seconds of all steps together."""
    started = time.perf_counter()
    for step in steps:
        function(step)
    return time.perf_counter() - started


def from_stream(training: Training, stream: Stream) -> tuple[float, float]:
    """Returns the seconds per step from the store, and the seconds of these spent waiting for the batch."""
    started, waited = time.perf_counter(), 0.0
    for _ in range(STEPS):
        begin = time.perf_counter()
        step = next(stream)
        waited += time.perf_counter() - begin
        training.step(step)
    return (time.perf_counter() - started) / STEPS, waited / STEPS


def loss_seconds(training: Training, step: Step) -> float:
    """Returns the seconds of a step in the loss over the vocabulary: both decoders, soft targets, KL, cross
    entropy and all gradients."""
    spent, real = 0.0, triple_loss.VocabularyLoss.forward

    def forward(*arguments: Any) -> Any:
        nonlocal spent
        begin = time.perf_counter()
        result = real(*arguments)
        spent += time.perf_counter() - begin
        return result

    with mock.patch.object(triple_loss.VocabularyLoss, "forward", staticmethod(forward)):
        training.step(step)
    return spent


def conditions(training: Training, seconds: Mapping[str, float]) -> str:
    times = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if "wait" not in name)
    return (
        f"{training.case.title}, {BATCH} x {LENGTH}, one rank, {torch.get_num_threads()} threads, "
        f"{training.train.dtype} on all sides; medians of {ROUNDS} in turn, seconds per step: {times}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    cases = parser.parse_args().cases
    if unknown := set(cases) - CASES.keys():
        parser.error(f"no case is called {min(unknown)}; there are: {', '.join(CASES)}")
    measured = run(cases)
    record(measured)
    print(rows_table(measured))
