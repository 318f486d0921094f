"""Models with random weights and batches of random text, small on a CPU and of BERT-base's size on a GPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from offline_teacher.teacher import LoadedTeacher, mlm_head
from student_train.objective import Objective
from student_train.soft_targets import TeacherHead
from student_train.stream import Batch
from transformers import BertConfig, BertForMaskedLM

from infra.sections import Student, Train
from offline_teacher.store.schema import Layout
from student_train.student import StudentModel, build_student


@dataclass(frozen=True)
class Size:
    """What the speed parts measure on a kind of device."""

    config: BertConfig
    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    rounds: int


@dataclass(frozen=True)
class Sample:
    """A padded batch of masked text, as a store holds it."""

    input_ids: np.ndarray = field(repr=False)  # [B, L]
    token_count: np.ndarray = field(repr=False)  # [B]
    positions: np.ndarray = field(repr=False)  # int16 [B, M]
    labels: np.ndarray = field(repr=False)  # [B, M]


def size_for(device: torch.device) -> Size:
    if device.type == "cuda":
        return Size(BertConfig(), lengths=(128, 512), batch_sizes=(32, 128, 256), rounds=20)
    return Size(tiny_config(), lengths=(16,), batch_sizes=(4,), rounds=2)


def tiny_config(vocab_size: int = 203) -> BertConfig:
    """A BERT of 3 layers; its vocabulary is no multiple of 8."""
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )


def random_teacher(config: BertConfig, seed: int = 0) -> BertForMaskedLM:
    """Random weights, biases too, in float32 on the CPU; logits spread as a trained model's are."""
    torch.manual_seed(seed)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.cls.predictions.decoder.weight.mul_(4)
    return model


def loaded(model: BertForMaskedLM, device: torch.device, dtype: torch.dtype) -> LoadedTeacher:
    """The teacher as a worker of the pass holds it."""
    head = mlm_head(model)
    encoder = copy.deepcopy(model.base_model).to(device, dtype).requires_grad_(False)
    return LoadedTeacher(encoder, None, head, model.config.to_dict(), "", "", torch.device(device), dtype)


def layout_for(config: BertConfig, length: int, top_k: int) -> Layout:
    return Layout(
        length=length,
        masked=max(1, length * 15 // 100),
        vocab_size=config.vocab_size,
        top_k=top_k,
        temperatures=(1.0, 2.0) if top_k else (),
        hidden_size=config.hidden_size,
        hidden_states="float16",
        positions="all",
    )


def random_text(layout: Layout, count: int, padded: bool, seed: int = 0) -> Sample:
    """Random ids; with ``padded`` every second sequence is half as long."""
    generator = np.random.default_rng(seed)
    token_count = np.full(count, layout.length, np.int64)
    token_count[1::2] -= layout.length // 2 if padded else 0
    ids = generator.integers(5, layout.vocab_size, (count, layout.length))
    ids[np.arange(layout.length) >= token_count[:, None]] = 0
    half = layout.length // 2  # inside every sequence
    drawn = [generator.permutation(half)[: layout.masked] for _ in range(count)]
    positions = np.full((count, layout.masked), -1, np.int16)
    for row, places in enumerate(drawn):
        positions[row, : len(places)] = np.sort(places)
    labels = generator.integers(5, layout.vocab_size, positions.shape)
    return Sample(ids, token_count, positions, np.where(positions >= 0, labels, 0))


def batch_of(text: Sample, columns: dict[str, np.ndarray]) -> Batch:
    """The batch that the stream makes of it, with the teacher's columns."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64))

    teacher: dict[str, Any] = {name: torch.from_numpy(values) for name, values in columns.items()}
    if "topk_ids" in teacher:
        teacher["topk_ids"] = teacher["topk_ids"].long()
    return Batch(
        input_ids=tensor(text.input_ids),
        token_count=tensor(text.token_count),
        masked_positions=tensor(text.positions),
        masked_labels=tensor(text.labels),
        sequence_ids=torch.arange(len(text.token_count)),
        replica=torch.zeros(len(text.token_count), dtype=torch.int64),
        **teacher,
    )


def student_and_loss(
    teacher: BertForMaskedLM, layout: Layout, train: Train, device: torch.device
) -> tuple[StudentModel, Objective]:
    """A student of half the depth without dropout, and its loss, on ``device`` in ``train.dtype``."""
    settings = Student(init="random", dropout=0.0)
    model = build_student(settings, teacher.config.to_dict(), None, seed=1)
    dtype = getattr(torch, train.dtype)
    head = TeacherHead.from_store(mlm_head(teacher)).to(device, dtype)
    return model.to(device, dtype), Objective(train, layout, head)
