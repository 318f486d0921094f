"""A recipe small enough to run from text to report in a test, and the three commands as a user types them."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import BertConfig, BertForMaskedLM

from infra.demo.language import documents
from infra.demo.make_teacher import build_tokenizer
from infra.demo.tasks import TASKS, task_files
from tests.conftest import ROOT

TASK = "SST-2"
LENGTH, CORPUS_BYTES, VALIDATION_BYTES = 32, 300_000, 20_000
SECONDS = 600
"""A command that takes longer than this hangs."""


def make_project(directory: Path, **sections: dict[str, object]) -> Path:
    """Corpus, teacher, task files and recipe below ``directory``; path of the recipe."""
    texts = list(documents(1, CORPUS_BYTES))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.txt").write_text("\n".join(texts) + "\n")
    (directory / "validation.txt").write_text("\n".join(documents(2, VALIDATION_BYTES)) + "\n")
    save_teacher(directory / "teacher")
    task = next(task for task in TASKS if task.name == TASK)
    (directory / "glue" / TASK).mkdir(parents=True)
    for name, text in task_files(dataclasses.replace(task, train=64, dev=32), 3).items():
        (directory / "glue" / TASK / name).write_text(text)
    recipe: dict[str, dict[str, object]] = {
        "corpus": {
            "path": [str(directory / "train.txt")],
            "validation_path": [str(directory / "validation.txt")],
        },
        "sequences": {"length": LENGTH, "part_bytes": 1 << 16},
        "masking": {"replicas": 2},
        "teacher": {"model": str(directory / "teacher"), "dtype": "float32", "batch_size": 16, "workers": 2},
        "store": {"top_k": 4, "samples_per_shard": 64},
        "student": {"layers": [0]},
        "train": {
            "epochs": 1, "batch_size": 64, "micro_batch_size": 32, "dtype": "float32",
            "log_every": 1, "checkpoint_every": 5, "compile": False,
        },
        "evaluation": {
            "tasks": [TASK], "data": str(directory / "glue"), "epochs": 1, "max_length": LENGTH,
            "latency_sentences": 8,
        },
    }  # fmt: skip
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "output": str(directory / "runs"), **recipe}))
    return path


def save_teacher(directory: Path, layers: int = 2) -> None:
    """A BERT masked LM with random weights, and the tokenizer of the demo's language."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertForMaskedLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def teacher_command(recipe: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "offline_teacher.main", "run", "--recipe", str(recipe), *overrides]


def student_command(recipe: Path, *overrides: str, ranks: int = 2) -> list[str]:
    """With the deepspeed launcher; ``ranks`` 0: plain python, one process."""
    script = [str(ROOT / "student_train" / "main.py"), "--recipe", str(recipe), *overrides]
    if ranks == 0:
        return [sys.executable, *script]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), *script]


def evaluation_command(recipe: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "evaluation.main", "--recipe", str(recipe), *overrides]


def all_commands(recipe: Path) -> list[list[str]]:
    return [teacher_command(recipe), student_command(recipe), evaluation_command(recipe)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
