"""Random models and batches of random text: tiny on a CPU, of BERT-base size on a GPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

from infra.settings.sections import Student, Train
from offline_teacher.families import family_of
from offline_teacher.inference.columns import Inference
from offline_teacher.inference.teacher import LoadedTeacher
from offline_teacher.models.replay import Replay
from offline_teacher.models.split import lower_part
from offline_teacher.models.weights import named_weights, top_weights
from offline_teacher.store.schema import Layout
from student_train.data.collate import Batch, collate
from student_train.objectives.freezing import freeze_unreached
from student_train.objectives.objective import Objective
from student_train.student.model import StudentModel, build_student

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Size:
    """Sizes of models and batches that the speed parts use on one kind of device."""

    config: BertConfig
    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    """Batch sizes of the teacher's forward; the student's step uses the last one."""
    rounds: int
    """Number of repetitions that are timed."""
    tasks: int
    """Tasks that the pass writes; each has 262,144 tokens on a GPU, and two batches on a CPU."""
    profile: bool = False
    """Whether the most expensive operations are recorded too."""

    @property
    def batch_size(self) -> int:
        return self.batch_sizes[-1]

    @property
    def narrow(self) -> int:
        """Hidden size of the narrow student."""
        return self.config.hidden_size // 2


def size_for(device: torch.device) -> Size:
    if device.type == "cuda":
        return Size(BertConfig(), lengths=(128, 512), batch_sizes=(256,), rounds=20, tasks=16)
    return Size(tiny_config(), lengths=(16,), batch_sizes=(4,), rounds=2, tasks=3)


def tiny_config(vocab_size: int = 203) -> BertConfig:
    """Returns a tiny BERT with 3 layers, whose vocabulary size is not a multiple of 8."""
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )


def random_teacher(config: BertConfig, seed: int = 0) -> BertForMaskedLM:
    """Returns a float32 model on the CPU with random weights and biases. Its logits have a spread like a
    trained model's."""
    torch.manual_seed(seed)
    full_config: Any = family_of(config).config(config)
    model = BertForMaskedLM(full_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.cls.predictions.decoder.weight.mul_(4)
    return model


def loaded(
    model: BertForMaskedLM, replay_layers: int, device: torch.device, dtype: torch.dtype
) -> LoadedTeacher:
    """Returns the teacher as a worker of the pass loads it; ``model`` is not changed."""
    model = copy.deepcopy(model)
    top = Replay(model.config, top_weights(model, replay_layers), replay_layers, dtype).to(device)
    lower_layers = lower_part(model, replay_layers).to(device=device, dtype=dtype)
    return LoadedTeacher(lower_layers, top, None, model.config, "", torch.device(device), dtype, {})


def layout_for(
    config: BertConfig, length: int, top_k: int, replay_layers: int = 0, hidden_states: str = "float16"
) -> Layout:
    return Layout(
        length=length,
        masked=max(1, length * 15 // 100),
        vocab_size=config.vocab_size,
        top_k=top_k,
        temperatures=(1.0, 2.0) if top_k else (),
        hidden_size=config.hidden_size,
        hidden_states=hidden_states,
        positions="all",
        replay_layers=replay_layers,
    )


def random_text(layout: Layout, count: int, padded: bool, seed: int = 0) -> Columns:
    """Returns the text columns of ``count`` random sequences. If ``padded``, every second sequence has half
    the length."""
    generator = np.random.default_rng(seed)
    token_count = np.full(count, layout.length, np.uint16)
    token_count[1::2] -= layout.length // 2 if padded else 0
    ids = generator.integers(5, layout.vocab_size, (count, layout.length))
    ids[np.arange(layout.length) >= token_count[:, None]] = 0
    half = layout.length // 2  # the masked positions are in the first half, which no sequence pads
    positions = np.stack([np.sort(1 + generator.permutation(half - 2)) for _ in range(count)])
    positions = positions[:, : layout.masked].astype(np.int16)
    unused = layout.masked - positions.shape[1]
    positions = np.pad(positions, ((0, 0), (0, unused)), constant_values=-1)
    labels = generator.integers(5, layout.vocab_size, positions.shape)
    return {
        "token_count": token_count,
        "input_ids": ids.astype(layout.id_dtype),
        "masked_positions": positions,
        "masked_labels": np.where(positions >= 0, labels, 0).astype(layout.id_dtype),
    }


def columns_of(teacher: LoadedTeacher, layout: Layout, text: Columns) -> Columns:
    """Computes the teacher's columns of one batch."""
    return Inference(teacher, layout).columns(text, len(text["token_count"])).wait()


def batch_of(layout: Layout, text: Columns, columns: Columns) -> Batch:
    """Returns the batch that a training stream makes of these columns."""
    return collate({**text, **columns}, layout.positions == "masked", layout.hidden_states == "bfloat16", 1.0)


def student_and_loss(
    teacher: BertForMaskedLM, layout: Layout, student: Student, train: Train, device: torch.device
) -> tuple[StudentModel, Objective]:
    """Returns a float32 student and its loss in ``train.dtype``, both on ``device``."""
    config, weights = teacher.config.to_dict(), named_weights(teacher)
    model = build_student(student, train, config, weights)
    replay = Replay(config, weights, layout.replay_layers)
    objective = Objective(train, layout, replay)
    freeze_unreached(model, objective)
    replay.to(device, getattr(torch, train.dtype))
    return model.to(device), objective
