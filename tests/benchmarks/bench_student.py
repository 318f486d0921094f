"""Training from a store over training with the teacher in the loop: BERT-base to 6 layers.

All candidates do whole optimiser steps of the same shape, in turn, on torch's threads. The weights and
the stored numbers are random: they do not change what is computed.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import BertConfig, BertForMaskedLM

from infra.sections import Student, Train
from offline_teacher.store.head import MlmHead
from offline_teacher.store.schema import Layout, ShardPlan
from offline_teacher.store.shard_file import open_file, write_file
from student_train.engine import Engine, World, start_world
from student_train.objective import Objective, attention_mask, columns_needed
from student_train.order import SampleOrder
from student_train.soft_targets import TeacherHead
from student_train.stream import Batch, Step, Stream
from student_train.student import build_student
from tests.benchmarks.live_reference import NO_LABEL, live_optimizer, live_step

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
PLAN = ShardPlan(sequences=512, replicas=1, samples_per_shard=64)
BATCH, MICRO = 16, 16
TOKENS = BATCH * LAYOUT.length
REPEATS = 4
STEPS = 3
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


def dense_inputs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask, labels [B, L] of a batch, for the live trainer."""
    labels = torch.full_like(batch.input_ids, NO_LABEL)
    labels.scatter_(1, batch.masked_positions, batch.masked_labels)
    return batch.input_ids, attention_mask(batch).long(), labels


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def run(live_fp32: bool = True) -> list[dict[str, Any]]:
    """One row for each ratio: name, value, unit, goal, holds, conditions."""
    world = start_world()
    config = BertConfig()
    torch.manual_seed(0)
    teacher = BertForMaskedLM(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        store = FileStore(directory)
        offline = OfflineTrainer(config, teacher, world, "bfloat16")
        live = copy.deepcopy(build_student(Student(init="random"), config.to_dict(), None).model)
        seconds, waits = measure(store, offline, teacher, live, live_fp32)
    world.close()
    return rows(seconds, waits)


def measure(
    store: FileStore,
    offline: OfflineTrainer,
    teacher: BertForMaskedLM,
    live: torch.nn.Module,
    live_fp32: bool,
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of single steps by candidate, the first of each left out, and shares of time spent waiting."""
    seconds: dict[str, list[float]] = {"store": [], "memory": [], "live_bf16": [], "live_fp32": []}
    waits: list[float] = []
    optimizer = live_optimizer(live)
    for number in range(REPEATS + 1):
        with offline.stream(store, number * (STEPS + 1)) as stream:
            kept = next(stream)  # the start of a run is not its steady state
            offline.step(kept)
            started = time.perf_counter()
            waited = 0.0
            for _ in range(STEPS):
                begin = time.perf_counter()
                step = next(stream)
                waited += time.perf_counter() - begin
                offline.step(step)
            total = time.perf_counter() - started
        memory = timed(lambda kept=kept: [offline.step(kept) for _ in range(STEPS)]) / STEPS
        inputs = [dense_inputs(batch) for batch in kept.micro_batches]
        bf16 = timed(lambda inputs=inputs: live_step(teacher, live, optimizer, inputs, bfloat16=True))
        fp32 = 0.0
        if live_fp32 and number < 3:
            fp32 = timed(lambda inputs=inputs: live_step(teacher, live, optimizer, inputs, bfloat16=False))
        if number:
            for name, value in (
                ("store", total / STEPS),
                ("memory", memory),
                ("live_bf16", bf16),
                ("live_fp32", fp32),
            ):
                seconds[name] += [value] if value else []
            waits.append(waited / total)
    return seconds, waits


def rows(seconds: dict[str, list[float]], waits: list[float]) -> list[dict[str, Any]]:
    middle = {name: float(np.median(values)) for name, values in seconds.items() if values}
    where = f"BERT-base to 6 layers, {BATCH} x {LAYOUT.length}, one rank, {torch.get_num_threads()} threads, "
    where += "bfloat16 from the store, exact soft targets; medians, in turn"
    measured: list[tuple[str, float, str, float | None, bool | None]] = [
        ("student.tokens_per_second", TOKENS / middle["store"], "tokens/s", None, None)
    ]
    for name, goal in (("live_fp32", 6.0), ("live_bf16", 2.0)):
        if name in middle:
            ratio = middle[name] / middle["store"]
            measured.append((f"student.over_{name}", ratio, "x", goal, ratio >= goal))
    ratio = middle["memory"] / middle["store"]
    measured.append(("student.over_in_memory", ratio, "x", 0.97, ratio >= 0.97))
    wait = float(np.median(waits))
    measured.append(("student.input_wait", wait, "of the time", 0.01, wait <= 0.01))
    keys = ("name", "value", "unit", "goal", "holds")
    return [{**dict(zip(keys, row, strict=True)), "conditions": where} for row in measured]


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
