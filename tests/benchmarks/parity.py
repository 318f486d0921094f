"""Compares the loss curves of training from a store and of training that runs the teacher in every step.

    python -m tests.benchmarks.parity [--steps 300] [--data ../shared] [--results runs/bench/benchmarks.json]

The teacher pass makes a store with the input of the teacher's top layer. The real trainer trains two students
on it, one with the triple loss and one with the relation loss. The other side is a simple trainer
(``live_reference``) that uses dense formulas and a float32 teacher, with the same initial weights, batches,
masks, learning rates, AdamW and clipping. Both compute in float32, and without dropout, whose random numbers
would differ. The remaining differences are hidden states rounded to float16, and the order of float32 sums.
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
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from infra.settings.recipe import StudentRun
from infra.settings.recipe_file import load_recipe
from offline_teacher.store.store import Store, open_store
from student_train.data.order import SampleOrder, chained_digest
from student_train.data.reading import open_stream
from student_train.data.stream import Step
from student_train.engine.learning_rate import learning_rate
from student_train.engine.world import World
from student_train.student.model import build_student
from tests.benchmarks.live_reference import (
    LiveRelations,
    LiveTriple,
    dense_inputs,
    live_optimizer,
)
from tests.benchmarks.results import RESULTS, Row, record, row, rows_table

ROOT = Path(__file__).resolve().parents[2]
LENGTH, BATCH = 64, 4
VALIDATION_CHARACTERS = 60_000
CHARACTERS_PER_TOKEN = 5
"""More than the average of English text, so that the excerpt is long enough."""
LOSS_GOAL, MEASURE_GOAL = 0.001, 0.01
RELATIONS = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0, "alpha_relation": 1.0}
STUDENTS: dict[str, dict[str, Any]] = {"triple": {}, "relations": {"train": RELATIONS}}


class Live(Protocol):
    """A loss that runs the teacher in every step."""

    def loss(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss of the batch, with gradient."""
        ...

    def distances(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Returns measure -> sum over the non-pad positions of a batch; validation reports the mean."""
        ...


@dataclass(frozen=True)
class Curve:
    """The result of one training."""

    losses: np.ndarray
    """Loss of each step [steps]."""
    measures: dict[str, float]
    """Measure -> distance between student and teacher on held-out text."""
    samples: str
    """Digest of all samples in their order."""
    seconds: float


def main() -> int:
    """Returns exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared", help="has teacher/, data/corpus/"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="JSON file of the rows; the plot is beside it"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = write_recipe(Path(scratch), options.data, options.steps)
        recipe = load_recipe(str(path))
        began = time.monotonic()
        _command("-m", "offline_teacher.main", "run", "--recipe", str(path))
        print(f"store: {time.monotonic() - began:.0f} s", file=sys.stderr)
        curves = {name: (from_store(path, run), with_teacher(run)) for name, run in recipe.runs().items()}
    rows = [row for name, pair in curves.items() for row in compare(name, *pair)]
    record(rows, options.results)
    picture = options.results.with_name("parity.png")
    plot(curves, picture)
    print(rows_table(rows), options.results, picture, sep="\n")
    return 0 if all(measured["holds"] for measured in rows) else 1


def write_recipe(scratch: Path, data: Path, steps: int) -> Path:
    """Writes an excerpt of the corpus, long enough for one epoch of ``steps``, and the recipe of both
    sides."""
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
        "store": {"top_k": 0, "hidden_states": "float16", "replay_layers": 1},
        "student": {"layers": "every_second", "dropout": 0.0},
        "train": {
            "max_steps": steps, "batch_size": BATCH, "micro_batch_size": BATCH, "dtype": "float32",
            "log_every": 1, "checkpoint_every": steps,
        },
        "students": STUDENTS,
        "tracking": {"enabled": False},
    }  # fmt: skip
    path = scratch / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def _beginning(texts: Iterator[str], characters: int) -> str:
    """Returns lines from the beginning of the texts, with at least ``characters`` characters."""
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


def from_store(path: Path, run: StudentRun) -> Curve:
    """Runs the real trainer's command, and reads the result from its history."""
    start = time.monotonic()
    _command("student_train/main.py", "--recipe", str(path), "--student", run.name)
    lines = [json.loads(line) for line in Path(run.directory, "history.jsonl").read_text().splitlines()]
    steps, measures = [line for line in lines if "loss" in line], lines[-1]
    held_out = {k.removeprefix("validation_"): v for k, v in measures.items() if k.startswith("validation_")}
    losses = np.array([line["loss"] for line in steps])
    return Curve(losses, held_out, steps[-1]["samples"], time.monotonic() - start)


def with_teacher(run: StudentRun) -> Curve:
    """Runs the simple trainer: every step runs the teacher and computes the loss by its dense formula."""
    from transformers import AutoModelForMaskedLM

    began, train, store = time.monotonic(), run.train, open_store(run.recipe.store_path)
    assert run.recipe.teacher is not None
    teacher = AutoModelForMaskedLM.from_pretrained(run.recipe.teacher.model, dtype=torch.float32).eval()
    weights = load_file(store.teacher_weights())
    student = build_student(run.student, train, store.teacher_config(), weights).model.train()
    live: Live = (
        LiveRelations(teacher, student, store.layout.replay_layers)
        if train.alpha_relation
        else LiveTriple(
            teacher, student, train.temperature, (train.alpha_ce, train.alpha_mlm, train.alpha_cos)
        )
    )
    losses, digest, optimizer = [], "", live_optimizer(student)
    assert train.max_steps is not None
    for number, step in enumerate(_steps(store, "train", run, train.max_steps * BATCH)):
        (batch,) = step.micro_batches
        optimizer.param_groups[0]["lr"] = learning_rate(train, number, train.max_steps)
        optimizer.zero_grad(set_to_none=True)
        loss = live.loss(*dense_inputs(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), train.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        digest = chained_digest(digest, step.locations)
        if number % 50 == 49:
            print(f"live {run.name}: step {number + 1}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    student.eval()
    return Curve(np.array(losses), held_out(live, store, run), digest, time.monotonic() - began)


def _steps(store: Store, split: str, run: StudentRun, samples: int) -> Iterator[Step]:
    """Yields steps of ids and masks in the trainer's order; no teacher outputs are read."""
    plan = store.splits[split].plan
    windows = run.train.window_batches if split == "train" else 1
    order = SampleOrder(plan, run.train.seed if split == "train" else 0, BATCH, samples, windows)
    alone = World(0, 1, torch.device("cpu"))
    with open_stream(store, split, [], order, run.train, alone) as stream:
        yield from stream


@torch.no_grad()
def held_out(live: Live, store: Store, run: StudentRun) -> dict[str, float]:
    """Returns measure -> mean over all tokens of the held-out split, from the dense formulas."""
    sums: dict[str, float] = {}
    count = 0
    for step in _steps(store, "validation", run, store.splits["validation"].plan.samples):
        ids, mask, _ = dense_inputs(step.micro_batches[0])
        for name, value in live.distances(ids, mask).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        count += int(mask.sum())
    return {name: value / count for name, value in sums.items()}


def compare(name: str, stored: Curve, live: Curve) -> list[Row]:
    """Returns the rows of one student: largest relative differences of the losses and of the measures."""
    assert stored.samples == live.samples, "the two did not train on the same samples"
    difference = np.abs(stored.losses / live.losses - 1)
    worst = max(abs(stored.measures[measure] / value - 1) for measure, value in live.measures.items())
    measures = ", ".join(
        f"{m}: {stored.measures[m]:.6f} and {value:.6f}" for m, value in live.measures.items()
    )
    conditions = (
        f"{len(live.losses)} steps of {BATCH} x {LENGTH} tokens of novels, 6-layer teacher, 3-layer student, "
        f"float32, no dropout, top layer replayed; loss {live.losses[0]:.3f} to {live.losses[-1]:.3f}, mean "
        f"relative difference {difference.mean():.1e}; held-out, store and live teacher, {measures}; "
        f"{stored.seconds:.0f} s and {live.seconds:.0f} s"
    )
    held_out_name = {"triple": "validation_kl", "relations": "validation_relation"}[name]
    prefix = {"triple": "parity", "relations": "parity.relations"}[name]
    return [
        row(f"{prefix}.{what}_relative_difference", value, "ratio", f"<= {goal}", conditions)
        for what, value, goal in (
            ("loss_curve_max", float(difference.max()), LOSS_GOAL),
            (held_out_name, worst, MEASURE_GOAL),
        )
    ]


def plot(curves: dict[str, tuple[Curve, Curve]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(curves), sharex=True, figsize=(11, 6), layout="constrained")
    for (above, below), (name, (stored, live)) in zip(axes.T, curves.items(), strict=True):
        steps = np.arange(1, len(live.losses) + 1)
        above.plot(steps, live.losses, color="0.6", linewidth=4, label="live dense teacher")
        above.plot(steps, stored.losses, color="tab:blue", linewidth=1, label="from the store")
        above.set(ylabel="loss", title=f"{name}: teacher in the loop, and from the store")
        above.legend()
        below.semilogy(steps, np.abs(stored.losses / live.losses - 1), color="tab:blue", linewidth=1)
        below.axhline(LOSS_GOAL, color="tab:red", linestyle="--", label="goal")
        below.set(xlabel="step", ylabel="relative difference")
        below.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
