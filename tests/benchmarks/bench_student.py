"""Training from a store over training with the teacher in the loop: BERT-base to 6 layers.

All candidates do whole optimiser steps of the same shape, in turn, on torch's threads. The weights and
the stored numbers are random: they do not change what is computed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from offline_teacher.store.head import MlmHead
from offline_teacher.store.shard_file import open_file, write_file
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from infra.sections import Student, Train
from offline_teacher.store.schema import Layout, ShardPlan
from student_train import losses
from student_train.data.order import SampleOrder
from student_train.data.stream import Step, Stream
from student_train.engine.engine import Engine
from student_train.engine.world import World, start_world
from student_train.objectives.objective import Objective, columns_needed
from student_train.objectives.soft_targets import TeacherHead
from student_train.student.model import build_student
from tests.benchmarks.live_reference import dense_inputs, live_optimizer, live_step
from tests.benchmarks.results import Row, row
from tests.benchmarks.timing import say_round

LAYOUT = Layout(
    length=128,
    masked=20,
    vocab_size=30522,
    top_k=0,
    temperatures=(),
    hidden_size=768,
    hidden_states="float16",
    positions="all",
)
PLAN = ShardPlan(sequences=256, replicas=1, samples_per_shard=64)
BATCH, MICRO = 16, 16
TOKENS = BATCH * LAYOUT.length
REPEATS, REPEATS_FP32 = 4, 2
"""Rounds that count; one more, first, warms up. The slowest candidate takes part in fewer."""
STEPS = 2
"""Steps from the store in one round, with one wait for the first batch less than a run has."""


class FileStore:
    """Random numbers in real shard files: as much of a store as the stream reads."""

    layout, plan = LAYOUT, PLAN

    def __init__(self, directory: str) -> None:
        self._directory = directory
        generator = np.random.default_rng(0)
        for index in range(PLAN.shards_per_replica):
            ids = np.array(PLAN.sequence_range(index))
            positions = (
                np.sort(generator.random((len(ids), 126)).argsort(axis=1)[:, : LAYOUT.masked], axis=1) + 1
            )
            columns = {
                "sequence_id": ids,
                "token_count": np.full(len(ids), LAYOUT.length, np.uint16),
                "input_ids": generator.integers(1000, 30000, (len(ids), LAYOUT.length)).astype(np.uint16),
                "masked_positions": positions.astype(np.int16),
                "masked_labels": generator.integers(1000, 30000, positions.shape).astype(np.uint16),
                "hidden_states": generator.standard_normal((len(ids), 128, 768), np.float32).astype(
                    np.float16
                ),
            }
            write_file(f"{directory}/{index}.arrow", LAYOUT, {}, columns)

    def shard(self, replica: int, index: int, cache: Any = None) -> Any:
        return SimpleNamespace(columns=open_file(f"{self._directory}/{index}.arrow", LAYOUT)[1])


class OfflineTrainer:
    """The trainer's own step, without its log."""

    def __init__(self, config: BertConfig, teacher: BertForMaskedLM, world: World, dtype: str) -> None:
        self.train = Train(batch_size=BATCH, micro_batch_size=MICRO, dtype=dtype, prefetch=4)
        self.model = build_student(Student(init="random"), config.to_dict(), None)
        head = TeacherHead.from_store(head_of(teacher)).to(world.device, getattr(torch, dtype))
        self.objective = Objective(self.train, LAYOUT, head)
        self.engine = Engine(self.model, self.train, world)

    def step(self, step: Step) -> float:
        total = 0.0
        for number, batch in enumerate(step.micro_batches):
            terms = self.objective(self.model, batch, step.tokens, step.masked)
            self.engine.backward(terms.total, number == len(step.micro_batches) - 1)
            total += float(terms.total.detach())
        self.engine.step(5e-4)
        return total

    def stream(self, store: FileStore, start: int) -> Stream:
        order = SampleOrder(PLAN, 0, 2)
        columns = columns_needed(self.train, LAYOUT)
        return Stream(store, order, BATCH, MICRO, 0, 1, start, start + STEPS + 1, 4, columns=columns)


def head_of(teacher: BertForMaskedLM) -> MlmHead:
    transform, decoder = teacher.cls.predictions.transform, teacher.cls.predictions.decoder
    return MlmHead(
        dense_weight=transform.dense.weight.detach().numpy(),
        dense_bias=transform.dense.bias.detach().numpy(),
        layer_norm_weight=transform.LayerNorm.weight.detach().numpy(),
        layer_norm_bias=transform.LayerNorm.bias.detach().numpy(),
        decoder_weight=decoder.weight.detach().numpy(),
        decoder_bias=decoder.bias.detach().numpy(),
        hidden_act=teacher.config.hidden_act,
        layer_norm_eps=teacher.config.layer_norm_eps,
    )


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def run() -> list[Row]:
    world = start_world()
    config = BertConfig()
    torch.manual_seed(0)
    teacher = BertForMaskedLM(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        store = FileStore(directory)
        offline = OfflineTrainer(config, teacher, world, "bfloat16")
        live = plain_student(offline)
        seconds = measure(store, offline, teacher, live)
    world.close()
    return rows(seconds)


def plain_student(offline: OfflineTrainer) -> DistilBertForMaskedLM:
    """The same architecture as transformers makes it, without anything of ours."""
    config = DistilBertConfig.from_dict(offline.model.model.config.to_dict())
    return DistilBertForMaskedLM(config).float().train()


def measure(
    store: FileStore, offline: OfflineTrainer, teacher: BertForMaskedLM, live: torch.nn.Module
) -> dict[str, list[float]]:
    """Seconds of single steps by candidate, and of ``loss`` and ``wait`` within one; the warm-up left out."""
    seconds: dict[str, list[float]] = {}
    optimizer = live_optimizer(live)
    for number in range(REPEATS + 1):
        measured = {}
        with offline.stream(store, number * (STEPS + 1)) as stream:
            kept = next(stream)  # the start of a run is not its steady state
            offline.step(kept)
            measured["store"], measured["wait"] = from_stream(offline, stream)
        measured["memory"] = timed(lambda kept=kept: [offline.step(kept) for _ in range(STEPS)]) / STEPS
        measured["loss"] = loss_seconds(offline, kept)
        inputs = [dense_inputs(batch) for batch in kept.micro_batches]
        for name, bfloat16 in (("live_bf16", True), ("live_fp32", False)):
            if bfloat16 or number <= REPEATS_FP32:
                measured[name] = timed(
                    lambda inputs=inputs, b=bfloat16: live_step(teacher, live, optimizer, inputs, bfloat16=b)
                )
        say_round("student", number, REPEATS, measured)
        if number:
            for name, value in measured.items():
                seconds.setdefault(name, []).append(value)
    return seconds


def from_stream(offline: OfflineTrainer, stream: Stream) -> tuple[float, float]:
    """Seconds of a step from the store, and those of them spent waiting for its batch."""
    started, waited = time.perf_counter(), 0.0
    for _ in range(STEPS):
        begin = time.perf_counter()
        step = next(stream)
        waited += time.perf_counter() - begin
        offline.step(step)
    return (time.perf_counter() - started) / STEPS, waited / STEPS


def loss_seconds(offline: OfflineTrainer, step: Step) -> float:
    """Seconds of one step spent on the vocabulary: both decoders, soft target, KL, CE, all gradients."""
    spent, real = 0.0, losses.VocabularyLoss.forward

    def forward(*arguments: Any) -> Any:
        nonlocal spent
        begin = time.perf_counter()
        result = real(*arguments)
        spent += time.perf_counter() - begin
        return result

    with mock.patch.object(losses.VocabularyLoss, "forward", staticmethod(forward)):
        offline.step(step)
    return spent


def rows(seconds: dict[str, list[float]]) -> list[Row]:
    middle = {name: float(np.median(values)) for name, values in seconds.items()}
    store = middle["store"]
    told = ", ".join(f"{name} {value:.2f}" for name, value in middle.items() if name != "wait")
    where = (
        f"BERT-base to 6 layers, {BATCH} x {LAYOUT.length}, one rank, {torch.get_num_threads()} threads, "
        f"bfloat16 from the store, exact soft targets; medians of {REPEATS} in turn (fp32 {REPEATS_FP32}), "
        f"seconds: {told}"
    )
    return [
        row(f"student.{name}", value, unit, goal, where)
        for name, value, unit, goal in (
            ("tokens_per_second", TOKENS / store, "tokens/s", None),
            ("over_live_fp32", middle["live_fp32"] / store, "ratio", ">= 6"),
            ("over_live_bf16", middle["live_bf16"] / store, "ratio", ">= 2"),
            ("over_in_memory", middle["memory"] / store, "ratio", ">= 0.97"),
            ("input_wait", middle["wait"] / store, "of the time", "<= 0.01"),
            ("loss_share", middle["loss"] / store, "of the time", None),
        )
    ]


if __name__ == "__main__":
    for measured in run():
        print(json.dumps(measured))
