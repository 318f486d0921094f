"""How the commands start: their words, and which packages an interpreter loaded to answer them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import ROOT

STUDENT = str(ROOT / "student_train" / "main.py")
DEMO_RECIPE = str(ROOT / "infra" / "recipes" / "demo.yaml")
HEAVY = {"torch", "ray", "mlflow", "transformers", "deepspeed", "datasets", "matplotlib", "sklearn", "scipy"}
"""Packages that take from half a second to several to load."""

COMMANDS: dict[str, list[str]] = {
    "teacher": ["-m", "offline_teacher.main"],
    "teacher run": ["-m", "offline_teacher.main", "run"],
    "teacher plan": ["-m", "offline_teacher.main", "plan"],
    "teacher verify": ["-m", "offline_teacher.main", "verify"],
    "teacher inspect": ["-m", "offline_teacher.main", "inspect"],
    "student": [STUDENT],
    "evaluation": ["-m", "evaluation.main"],
    "evaluation export": ["-m", "evaluation.main", "export"],
    "demo": ["-m", "infra.demo"],
    "sizing": ["-m", "infra.sizing"],
}
"""Every command of ours, as python's arguments."""


def mistakes(directory: Path) -> dict[str, list[str]]:
    """A mistake in each command that takes a recipe or a directory; the words behind python."""
    misspelt = ["--recipe", DEMO_RECIPE, "train.learning_rat=1e-4"]
    absent, output = str(directory / "absent"), str(directory / "output")
    return {
        "teacher run": [*COMMANDS["teacher run"], *misspelt],
        "teacher plan": [*COMMANDS["teacher plan"], *misspelt],
        "teacher verify": [*COMMANDS["teacher verify"], absent],
        "teacher inspect": [*COMMANDS["teacher inspect"], absent],
        "student": [*COMMANDS["student"], *misspelt],
        "evaluation": [*COMMANDS["evaluation"], *misspelt],
        "evaluation, no student": [*COMMANDS["evaluation"], "--recipe", DEMO_RECIPE, f"output={directory}"],
        "evaluation of a model": [
            *COMMANDS["evaluation"], "--model", absent, "--tasks", "RTE", "--data", absent, "--output", output
        ],
        "evaluation export": [*COMMANDS["evaluation export"], "--model", absent, "--output", output],
        "sizing": [*COMMANDS["sizing"], "--tokens", "1e9"],
        "demo": [*COMMANDS["demo"], "--nonsense"],
    }  # fmt: skip


def start(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it; on stderr also a line for each module that is imported."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What a launcher tells one of ``count`` ranks, which meet at ``port`` of this machine."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(count)}


def loaded(ended: subprocess.CompletedProcess[str]) -> set[str]:
    """Top-level packages that a command from ``start`` imported."""
    lines = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
