"""``python -m tests.gpu``: checks results on a GPU and measures its speed.

The program needs torch, transformers and pydantic, but no network. Without DeepSpeed, the parts that need the
trainer's engine are skipped. Parts named ``check_*`` compare results of the GPU with those of the CPU or of
float64, and fail if they differ. Parts named ``speed_*`` measure tokens per second and model FLOP
utilisation, the share of the GPU's peak FLOP/s. Without a GPU, or with ``--device cpu``, the same parts run
on tiny models, so that the program itself can be tested on any machine.

Results go to a JSON file. The exit code is 1 if a check fails. All parts together take some minutes on one
H100; ``--skip NAME`` leaves a part out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.gpu import checks, copies, speed, trainer
from tests.gpu.models import Size, size_for
from tests.gpu.steps import close_world

Part = Callable[[torch.device, Size], dict[str, Any]]

PARTS: dict[str, Part] = {
    "check_reduction": checks.reduction,
    "check_quantisation": checks.quantisation,
    "check_loss": checks.loss,
    "check_relations": checks.relations,
    "check_columns": checks.columns,
    "check_graphs": checks.graphs,
    "check_replay": checks.replay,
    "check_ring": copies.ring,
    "check_training": checks.training,
    "check_resume": trainer.resume,
    "speed_pass": speed.teacher_pass,
    "speed_plain_step": speed.plain_step,
    "speed_engine_step": speed.engine_step,
}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic, and the default on Hopper
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"machine": _machine(device), "parts": {}}
    size = dataclasses.replace(size_for(device), profile=options.profile)
    for name, part in PARTS.items():
        if name in options.skip:
            continue
        print(f"{name} ...", end=" ", flush=True)
        result = _run(part, device, size)
        results["parts"][name] = result
        print(f"{_outcome(result)} ({result['seconds']:.0f} s)", flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    close_world()
    print(_table(results["parts"]))
    print(f"results: {options.out}")
    return 0 if all(part["ok"] for part in results["parts"].values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description="Correctness and speed on a GPU; without one, on tiny models."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--skip", action="append", default=[], choices=list(PARTS), help="leave a part out")
    parser.add_argument("--profile", action="store_true", help="also record which operations take the time")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.json"), metavar="FILE", help="default: gpu.json"
    )
    return parser


def _outcome(result: dict[str, Any]) -> str:
    if not result["ok"]:
        return f"FAILED: {result['error']}"
    return f"skipped: {result['skipped']}" if "skipped" in result else "ok"


def _run(part: Part, device: torch.device, size: Size) -> dict[str, Any]:
    """Runs a part; returns its results, ``ok``, ``seconds``, and error and traceback if it failed."""
    started = time.perf_counter()
    try:
        result = {"ok": True, **part(device, size)}
    except Exception as error:  # the other parts run even if one fails
        result = {
            "ok": False,
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    return {**result, "seconds": round(time.perf_counter() - started, 2)}


def _machine(device: torch.device) -> dict[str, Any]:
    import transformers

    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "CPU",
        "type": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "peak_flops_bfloat16": speed.peak_flops(device),
    }


def _table(parts: dict[str, Any]) -> str:
    """Returns one line of text per measured row."""
    lines = []
    for name, part in parts.items():
        for row in part.get("rows", []):
            share = f", {100 * row['utilisation']:.1f} % of peak" if row.get("utilisation") else ""
            lines.append(f"{name}: {row['what']}: {row['tokens_per_second']:,.0f} tokens/s{share}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
