"""One setting of the training at a time, at equal tokens: what a student of the shared teacher gains by it.

    python -m tests.benchmarks.sweep --directory DIR [--steps 48] [--seeds 0 1] [--data ../shared]
    python -m tests.benchmarks.sweep --directory DIR --table

Every run starts from the baseline (learning rate 1e-4, layers 0, 2 and 5, KL at all positions, 15 % masked,
no dropout, triple loss) with one setting changed, learns from novels, and is measured by its KL (T = 2) and
masked LM loss on held-out novels, masked alike for all. The untrained start is measured beside them.

Runs come seed after seed and are appended to ``DIR/sweep.jsonl`` as they finish. Given again, the command
goes on where it stopped. ``--table`` prints what there is: a mean over seeds, the spread, and how many.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from infra.console import table
from infra.files import storage
from infra.settings.recipe_file import load_recipe
from offline_teacher.store.reader import open_store
from student_train.engine.world import World
from student_train.main import model_and_objective
from student_train.objectives.validation import validate

ROOT = Path(__file__).resolve().parents[2]
LENGTH, BATCH, CHARACTERS_PER_TOKEN, HELD_OUT_CHARACTERS = 64, 32, 5, 40_000
BASELINE: dict[str, dict[str, Any]] = {
    "student": {"layers": [0, 2, 5], "dropout": 0.0},
    "train": {"learning_rate": 1e-4},
}
FACTORS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "learning_rate 5e-5": {"train": {"learning_rate": 5e-5}},
    "learning_rate 2e-4": {"train": {"learning_rate": 2e-4}},
    "learning_rate 5e-4": {"train": {"learning_rate": 5e-4}},
    "layers 0 2 4": {"student": {"layers": [0, 2, 4]}},
    "layers 0 1 2": {"student": {"layers": [0, 1, 2]}},
    "layers 0 1 5": {"student": {"layers": [0, 1, 5]}},
    "kl_positions masked": {"train": {"kl_positions": "masked"}},
    "masking 30 %": {"masking": 0.3},
    "masking 40 %": {"masking": 0.4},
    "dropout 0.1": {"student": {"dropout": 0.1}},
}
MEASURES = ("kl_t2", "mlm_loss")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, required=True, help="where all is made, and gone on with")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared", help="has teacher/, data/corpus/"
    )
    parser.add_argument("--steps", type=int, default=48, help=f"of {BATCH} x {LENGTH} tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--table", action="store_true", help="print what is measured, and run nothing")
    options = parser.parse_args()
    results = options.directory / "sweep.jsonl"
    if not options.table:
        options.directory.mkdir(parents=True, exist_ok=True)
        write_text(options.directory, options.data, options.steps)
        measure_start(options)
        for seed in options.seeds:
            for name in FACTORS:
                if (name, seed) not in {(line["name"], line["seed"]) for line in finished(results)}:
                    append(results, {"name": name, "seed": seed, **run(options, name, seed)})
    print(shown(finished(results)))
    return 0


def finished(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def append(results: Path, line: dict[str, Any]) -> None:
    lines = [json.dumps(one) for one in [*finished(results), line]]
    storage.publish_bytes(str(results), ("\n".join(lines) + "\n").encode())


def write_text(directory: Path, data: Path, steps: int) -> None:
    """The beginning of every novel, so much that no run reads a sequence twice."""
    wanted = {"train": steps * BATCH * LENGTH * CHARACTERS_PER_TOKEN, "validation": HELD_OUT_CHARACTERS}
    for split, characters in wanted.items():
        paths = sorted((data / "data" / "corpus" / split).glob("*.txt"))
        texts = [path.read_text()[5_000:][: characters // len(paths) + 1_000] for path in paths]
        lines = [line for text in texts for line in text.splitlines()[1:-1]]
        storage.keep_bytes(str(directory / f"{split}.txt"), ("\n".join(lines) + "\n").encode())


def recipe_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    """The recipe of one run. Those of one masking probability share a store; one alone has held-out text."""
    factor = FACTORS[name]
    masking, directory = factor.get("masking", 0.15), options.directory
    held_out = {"validation_path": str(directory / "validation.txt")} if masking == 0.15 else {}
    sections = {
        "name": f"{name.replace(' ', '-').replace('%', 'percent')}-{seed}",
        "output": str(directory / "runs"),
        "corpus": {"path": str(directory / "train.txt"), **held_out},
        "sequences": {"length": LENGTH},
        "masking": {"probability": masking},
        "teacher": {"model": str(options.data / "teacher"), "workers": 1},
        "store": {"path": str(directory / f"store-{masking}"), "top_k": 0, "replay_layers": 1},
        "student": {**BASELINE["student"], **factor.get("student", {})},
        "train": {
            **BASELINE["train"], "max_steps": options.steps, "batch_size": BATCH, "micro_batch_size": BATCH,
            "seed": seed, "log_every": 8, "checkpoint_minutes": 3.0, **factor.get("train", {}),
        },
        "tracking": {"enabled": False},
    }  # fmt: skip
    path = directory / f"{sections['name']}.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def run(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Trains one student, after the store if it is not there; its measures."""
    recipe = recipe_of(options, name, seed)
    command("-m", "offline_teacher.main", "run", "--recipe", str(recipe))
    command("student_train/main.py", "--recipe", str(recipe))
    measures = measure(options, name, seed, f"{load_recipe(str(recipe)).run('student').directory}/model")
    return {**measures, "tokens": options.steps * BATCH * LENGTH}


def measure_start(options: argparse.Namespace) -> None:
    """Of the student that no step has changed."""
    results = options.directory / "sweep.jsonl"
    if not any(line["name"] == "untrained" for line in finished(results)):
        recipe = recipe_of(options, "baseline", 0)
        command("-m", "offline_teacher.main", "run", "--recipe", str(recipe))
        append(
            results, {"name": "untrained", "seed": 0, "tokens": 0, **measure(options, "baseline", 0, None)}
        )


def measure(options: argparse.Namespace, name: str, seed: int, weights: str | None) -> dict[str, float]:
    """The measures of a trained model directory, or of the start, on the baseline's held-out text."""
    from transformers import AutoModelForMaskedLM

    one = load_recipe(str(recipe_of(options, name, seed))).run("student")
    store = open_store(str(options.directory / "store-0.15"))
    alone = World(0, 1, torch.device("cpu"))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    model, objective = model_and_objective(one, store, alone)
    if weights is not None:
        model.model = AutoModelForMaskedLM.from_pretrained(weights, dtype=torch.float32)
    dtype = getattr(torch, one.train.dtype)
    measures = validate(model.to(dtype), objective, store, alone, one.train)
    return {key: measures[key] for key in MEASURES}


def command(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def shown(lines: list[dict[str, Any]]) -> str:
    """A Markdown-like table; the spread is the largest less the smallest over seeds."""
    rows = []
    for name in ("untrained", *FACTORS):
        own = [line for line in lines if line["name"] == name]
        if own:
            cells = [f"{own[0]['tokens']:,}", str(len(own))]
            for key in MEASURES:
                values = [line[key] for line in own]
                cells.append(f"{statistics.mean(values):.4f} ({max(values) - min(values):.4f})")
            rows.append([name, *cells])
    return table(rows, ["setting", "tokens", "seeds", *(f"{key}: mean (spread)" for key in MEASURES)])


if __name__ == "__main__":
    sys.exit(main())
