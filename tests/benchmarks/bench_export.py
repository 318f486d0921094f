"""Difference, size and speed of an exported student relative to the torch model, at batch size 1.

``run()`` uses the shared teacher's architecture at half depth with a task head. The weights are those of
``../shared/teacher`` if it exists, else random; they do not affect size and speed.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from evaluation.devices.export import TOLERANCE, export_model, sample_inputs
from evaluation.devices.export_files import FLOAT32, INT8
from evaluation.devices.onnx_model import open_session, session_runner

LENGTH, SENTENCES, REPEATS = 32, 10, 7
TEACHER = Path(__file__).resolve().parents[3] / "shared" / "teacher"


def build_student() -> Any:
    """Returns a BERT with 3 layers, hidden size 384, vocabulary 30,522 and two classes."""
    from transformers import BertConfig, BertForSequenceClassification, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    if TEACHER.is_dir():
        return BertForSequenceClassification.from_pretrained(
            str(TEACHER), num_hidden_layers=3, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    config = BertConfig(hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536)
    config._attn_implementation = "eager"
    return BertForSequenceClassification(config).eval()


def cpu_seconds(functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the median CPU seconds of each function; they run in turn, in this thread only. CPU time does
    not include waiting for a busy machine."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(REPEATS + 1):  # the first round is not counted
        for name, function in functions.items():
            start = time.thread_time()
            function()
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def run() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    model = build_student()
    with tempfile.TemporaryDirectory() as output, torch.inference_mode():
        summary = export_model(model, output, "benchmark")
        inputs = sample_inputs(model.config, (1, LENGTH))
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        functions: dict[str, Any] = {"torch": lambda: [model(**tensors) for _ in range(SENTENCES)]}
        for file in (FLOAT32, INT8):
            runner = session_runner(open_session(os.path.join(output, file)))
            functions[file] = lambda runner=runner: [runner(inputs) for _ in range(SENTENCES)]
        seconds = cpu_seconds(functions)
    weights = "real" if TEACHER.is_dir() else "random"
    conditions = (
        f"BERT 3 x 384, V 30,522, {weights} weights, batch 1 x {LENGTH} tokens, 1 thread, "
        f"CPU time, median of {REPEATS} x {SENTENCES}"
    )

    def row(name: str, value: float, unit: str, goal: str | None, holds: bool | None) -> dict[str, Any]:
        return {
            "name": f"export.{name}", "value": round(value, 9), "unit": unit, "goal": goal, "holds": holds,
            "conditions": conditions,
        }  # fmt: skip

    difference, ratio = summary["difference"]["float32"], summary["int8_size_ratio"]
    # The int8 weights are expanded when the file is loaded, so int8 should be as fast as float32, up to
    # noise.
    speed = seconds[FLOAT32] / seconds[INT8]
    return [
        row("onnx_fp32_difference", difference, "absolute", f"<= {TOLERANCE:g}", difference <= TOLERANCE),
        row("int8_size_ratio", ratio, "of fp32 bytes", "< 1/3", ratio < 1 / 3),
        row("int8_over_fp32_onnx", speed, "times", "> 0.9", speed > 0.9),
        row("fp32_onnx_over_torch", seconds["torch"] / seconds[FLOAT32], "times", None, None),
    ]


if __name__ == "__main__":
    for measured in run():
        print(measured)
