"""Training from a store against training with the teacher in the loop: the same steps, two loss curves.

    python -m tests.benchmarks.parity [--steps 300] [--data ../shared] [--results runs/bench/benchmarks.json]

The store is made by the teacher pass and learned from by the trainer, as a user's are. The other side is the
plain trainer of ``live_reference``: dense logits of a float32 teacher, same initial weights, batches, masks,
rates, AdamW and clipping. Both compute in float32 and without dropout, which would differ by its random
numbers. What is left between them: hidden states rounded to float16, and the order of float32 sums.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional

from infra.recipe import Recipe, load_recipe
from offline_teacher.store.reader import Store, open_store
from student_train.data.order import SampleOrder, run_steps
from student_train.data.stream import Step, Stream
from student_train.engine.schedule import learning_rate
from student_train.student.model import build_student
from student_train.trainer import chained_digest
from tests.benchmarks.live_reference import dense_inputs, live_loss, live_optimizer
from tests.benchmarks.results import RESULTS, Row, record, row, shown

ROOT = Path(__file__).resolve().parents[2]
LENGTH, BATCH = 64, 4
TEMPERATURES = (1.0, 2.0)
VALIDATION_CHARACTERS = 60_000
CHARACTERS_PER_TOKEN = 5
"""More than English text has, so that there is enough of it."""
LOSS_GOAL, KL_GOAL = 0.001, 0.01


@dataclass(frozen=True)
class Curve:
    """One training: loss of every step, KL to the teacher on held-out text by temperature, digest of all
    samples in order."""

    losses: np.ndarray
    kl: dict[float, float]
    samples: str
    seconds: float


def main() -> int:
    """Exit code 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared", help="has teacher/, data/corpus/"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the rows go; the plot beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = write_recipe(Path(scratch), options.data, options.steps)
        recipe = load_recipe(str(path))
        began = time.monotonic()
        _command("-m", "offline_teacher.main", "run", "--recipe", str(path))
        print(f"store and held-out store: {time.monotonic() - began:.0f} s", file=sys.stderr)
        stored = from_store(path, recipe)
        live = with_teacher(recipe)
    assert stored.samples == live.samples, "the two did not train on the same samples"
    rows = compare(stored, live)
    record(rows, options.results)
    picture = options.results.with_name("parity.png")
    plot(stored, live, picture)
    print(shown(rows), options.results, picture, sep="\n")
    return 0 if all(measured["holds"] for measured in rows) else 1


def write_recipe(scratch: Path, data: Path, steps: int) -> Path:
    """An excerpt of the corpus, just long enough for one epoch of ``steps``, and the recipe of both sides."""
    characters = steps * BATCH * LENGTH * CHARACTERS_PER_TOKEN
    for name, length in (("train", characters), ("validation", VALIDATION_CHARACTERS)):
        texts = (path.read_text() for path in sorted((data / "data" / "corpus" / name).glob("*.txt")))
        (scratch / f"{name}.txt").write_text(_beginning(texts, length))
    sections: dict[str, Any] = {
        "name": "parity",
        "output": str(scratch / "runs"),
        "corpus": {"path": str(scratch / "train.txt"), "validation_path": str(scratch / "validation.txt")},
        "sequences": {"length": LENGTH},
        "teacher": {"model": str(data / "teacher"), "dtype": "float32", "workers": 2},
        "store": {"top_k": 0, "hidden_states": "float16", "samples_per_shard": 256},
        "student": {"layers": "every_second", "dropout": 0.0},
        "train": {
            "max_steps": steps, "batch_size": BATCH, "micro_batch_size": BATCH, "dtype": "float32",
            "log_every": 1, "checkpoint_every": steps,
        },
        "tracking": {"enabled": False},
    }  # fmt: skip
    path = scratch / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def _beginning(texts: Iterator[str], characters: int) -> str:
    """Whole lines from the beginning of the texts."""
    lines, length = [], 0
    for text in texts:
        for line in text.splitlines():
            lines.append(line)
            length += len(line)
            if length >= characters:
                return "\n".join(lines) + "\n"
    raise SystemExit(
        f"error: the corpus has {length:,} characters; {characters:,} are needed, use fewer --steps"
    )


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def from_store(path: Path, recipe: Recipe) -> Curve:
    """The real trainer, as a user starts it; what it wrote into its history."""
    began = time.monotonic()
    _command("student_train/main.py", "--recipe", str(path))
    lines = [json.loads(line) for line in Path(recipe.student_dir, "history.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    kl = {t: lines[-1][f"validation_kl_t{t:g}"] for t in TEMPERATURES}
    losses = np.array([line["loss"] for line in steps])
    return Curve(losses, kl, steps[-1]["samples"], time.monotonic() - began)


def with_teacher(recipe: Recipe) -> Curve:
    """The plain trainer: every step runs the teacher and computes the loss from dense logits."""
    from transformers import AutoModelForMaskedLM

    began, train, store = time.monotonic(), recipe.train, open_store(recipe.store_dir)
    directory = recipe.teacher.model
    teacher = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    built = build_student(recipe.student, teacher.config.to_dict(), directory, seed=train.seed)
    student, losses, digest = built.model.train(), [], ""
    optimizer = live_optimizer(student)
    assert train.max_steps is not None
    total = train.max_steps
    for number, step in enumerate(_steps(store, train.seed, train.window_shards, total, total * BATCH)):
        (batch,) = step.micro_batches
        optimizer.param_groups[0]["lr"] = learning_rate(train, number, total)
        optimizer.zero_grad(set_to_none=True)
        terms = live_loss(
            teacher,
            student,
            *dense_inputs(batch),
            train.temperature,
            (train.alpha_ce, train.alpha_mlm, train.alpha_cos),
        )
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(student.parameters(), train.max_grad_norm)
        optimizer.step()
        losses.append(terms["loss"].item())
        digest = chained_digest(digest, step.replicas, step.sequence_ids)
        if number % 50 == 49:
            print(f"live teacher: step {number + 1}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    kl = dense_kl(teacher, student.eval(), open_store(recipe.validation_store_dir))
    return Curve(np.array(losses), kl, digest, time.monotonic() - began)


def _steps(store: Store, seed: int, window_shards: int, steps: int, samples: int) -> Iterator[Step]:
    """Ids and masks in the order of the trainer; nothing of the teacher is read."""
    order = SampleOrder(store.plan, seed, window_shards)
    with Stream(store, order, BATCH, BATCH, 0, 1, 0, steps, samples=samples, columns=()) as stream:
        yield from stream


@torch.no_grad()
def dense_kl(teacher: nn.Module, student: nn.Module, store: Store) -> dict[float, float]:
    """KL(teacher || student) by temperature, a mean over all tokens of a store, from dense logits."""
    sums, count = dict.fromkeys(TEMPERATURES, 0.0), 0
    samples = store.plan.sequences
    for step in _steps(store, 0, 1, run_steps(samples, BATCH), samples):
        ids, mask, _ = dense_inputs(step.micro_batches[0])
        p, q = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (teacher, student))
        for t in TEMPERATURES:
            log_p, log_q = functional.log_softmax(p / t, dim=-1), functional.log_softmax(q / t, dim=-1)
            sums[t] += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
        count += len(p)
    return {t: value / count for t, value in sums.items()}


def compare(stored: Curve, live: Curve) -> list[Row]:
    """Rows of benchmarks.json."""
    difference = np.abs(stored.losses / live.losses - 1)
    kl = max(abs(stored.kl[t] / live.kl[t] - 1) for t in TEMPERATURES)
    told = ", ".join(f"T = {t:g}: {stored.kl[t]:.6f} and {live.kl[t]:.6f}" for t in TEMPERATURES)
    conditions = (
        f"{len(live.losses)} steps of {BATCH} x {LENGTH} tokens of novels, 6-layer teacher, 3-layer student, "
        f"float32, no dropout; loss {live.losses[0]:.3f} to {live.losses[-1]:.3f}, mean relative difference "
        f"{difference.mean():.1e}; held-out KL, store and live teacher, {told}; "
        f"{stored.seconds:.0f} s and {live.seconds:.0f} s"
    )
    return [
        row(f"parity.{name}_relative_difference", value, "ratio", f"<= {goal}", conditions)
        for name, value, goal in (
            ("loss_curve_max", float(difference.max()), LOSS_GOAL),
            ("validation_kl", kl, KL_GOAL),
        )
    ]


def plot(stored: Curve, live: Curve, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    steps = np.arange(1, len(live.losses) + 1)
    above.plot(steps, live.losses, color="0.6", linewidth=4, label="live dense teacher")
    above.plot(steps, stored.losses, color="tab:blue", linewidth=1, label="from the store")
    above.set(ylabel="loss", title="The same steps with the teacher in the loop and from the store")
    above.legend()
    below.semilogy(steps, np.abs(stored.losses / live.losses - 1), color="tab:blue", linewidth=1)
    below.axhline(LOSS_GOAL, color="tab:red", linestyle="--", label="goal")
    below.set(xlabel="step", ylabel="relative difference")
    below.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
