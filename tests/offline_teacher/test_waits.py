"""The teacher pass and its device: no batch waits for the host, and every copy is asynchronous."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.settings.sections import Teacher
from offline_teacher import inference
from offline_teacher.inference.columns import Inference
from offline_teacher.inference.teacher import LoadedTeacher, load_teacher
from offline_teacher.store.schema import Layout
from tests.offline_teacher.tiny_teacher import save_bert
from tests.waits import Waits

READS = {"item", "cpu", "numpy", "tolist", "nonzero", "synchronize"}
"""Methods of a tensor or an event for which the host waits."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> LoadedTeacher:
    directory = save_bert(tmp_path_factory.mktemp("teacher"))
    return load_teacher(Teacher(model=str(directory), dtype="float32"), 1, True, "cpu")


@pytest.mark.parametrize("shortest", [16, 9])
@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 0, "temperatures": ()},
        {"top_k": 0, "temperatures": (), "hidden_states": "int8"},
        {"top_k": 0, "temperatures": (), "hidden_states": "bfloat16"},
        {"top_k": 6},
        {"top_k": 6, "positions": "masked"},
        {"top_k": 6, "hidden_states": "none"},
    ],
)
def test_no_batch_of_a_pass_waits_for_its_device(
    teacher: LoadedTeacher, changes: dict[str, Any], shortest: int
) -> None:
    """Several batches of a shard: only ``Pending.wait``, which is not called here, may wait."""
    shape = {"length": 16, "masked": 3, "vocab_size": 95, "hidden_size": teacher.config.hidden_size}
    fixed = {"temperatures": (1.0,), "hidden_states": "float16", "positions": "all", "replay_layers": 0}
    layout = Layout(**{**shape, **fixed, **changes})
    counts = np.array([16, shortest, 12, 16, 16, shortest], np.uint16)
    masked = np.tile(np.array([1, 4, -1], np.int16), (len(counts), 1))
    ids = np.random.default_rng(0).integers(5, 90, (len(counts), 16)).astype(np.uint16)
    text = {"input_ids": ids, "token_count": counts, "masked_positions": masked}
    with Waits() as waits:
        Inference(teacher, layout).columns(text, batch_size=2)
    assert waits.seen == []


def test_copies_between_host_and_device_are_pinned_and_asynchronous() -> None:
    """In this room, `to_device` and `to_host` alone copy, and `Pending` alone waits."""
    copies, waits = set(), set()
    for path in sorted(Path(inference.__path__[0]).glob("*.py")):
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            where = f"{path.name}: {function.name}"
            for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
                name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
                words = {word.arg for word in call.keywords}
                if words & {"non_blocking", "pin_memory"} or name in ("pin_memory", "cuda"):
                    copies.add(where)
                if name in READS:
                    waits.add(where)
    assert copies == {"batches.py: _pinned", "batches.py: to_device", "batches.py: to_host"}
    assert waits == {"shard_columns.py: wait", "batches.py: _recorded_positions"}  # the latter is numpy
