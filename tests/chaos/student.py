"""Kills student training at random moments, at changing world sizes, and compares it with undisturbed runs.

    python -m tests.chaos.student --kills 30 [--epochs N] [--directory DIR] [--seed N]

The loss is the triple loss plus relations, from a store whose top layer is replayed. The last fifth of the
steps is a phase on a second store with sequences twice as long.

1. One rank, never killed, makes the reference log of sample digests and losses.
2. Runs with 1, 2, 1, 3, ... ranks are killed at random moments. At every step, the digest of all samples so
   far must equal the reference.
3. Two ranks that are killed must also have bit-equal losses to two ranks that are never killed.

Prints one JSON line; exits 1 if anything differs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from student_train.engine.world import free_port
from student_train.objectives.objective import TERMS
from tests.chaos.arguments import described
from tests.student_train.tiny_run import make_phased_run

ROOT = Path(__file__).resolve().parents[2]
WORLDS = (1, 2, 1, 3)
BATCH = 12
TRAIN: dict[str, float] = {
    "batch_size": BATCH,
    "micro_batch_size": 2,
    "checkpoint_every": 3,
    "alpha_relation": 1.0,
}
SECONDS_TO_FIRST_STEP = 120.0


def start(recipe: Path, name: str, ranks: int) -> subprocess.Popen:
    """Starts the documented command in a new session; its output goes to a log beside the recipe."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    launch += ["--master_port", str(free_port())]
    script = [str(ROOT / "student_train" / "main.py"), "--recipe", str(recipe), f"name={name}"]
    command = [*launch, *script] if ranks > 1 else [sys.executable, *script]
    with (recipe.parent / f"{name}.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)


def kill_tree(process: subprocess.Popen) -> None:
    """Kills the launcher and all ranks, which torchrun starts in separate sessions."""
    launcher = psutil.Process(process.pid)
    processes = [launcher, *launcher.children(recursive=True)]
    for member in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(processes)


def history(directory: Path) -> list[dict[str, Any]]:
    """Returns the logged steps, without a line that a kill has cut off."""
    path, lines = directory / "students" / "student" / "history.jsonl", []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if "samples" in value:
                lines.append(value)
    return lines


def run_to_end(recipe: Path, name: str, ranks: int) -> list[dict[str, Any]]:
    """Trains without kills, and returns the log."""
    process = start(recipe, name, ranks)
    if process.wait() != 0:
        raise SystemExit(f"{name} failed:\n{(recipe.parent / f'{name}.log').read_text()[-3000:]}")
    return history(recipe.parent / "runs" / name)


def killed(
    recipe: Path, name: str, worlds: tuple[int, ...], kills: int, rng: random.Random
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Trains to the end with ``kills`` SIGKILLs. Returns the final log, all lines ever logged, and the kills.
    A kill comes a random time after a new line of the log; every fifth comes a random time after the start.
    So the training always makes progress."""
    directory = recipe.parent / "runs" / name
    all_lines: list[dict[str, Any]] = []
    done = attempts = 0
    while True:
        process = start(recipe, name, worlds[attempts % len(worlds)])
        attempts += 1
        if done < kills:
            early = attempts % 5 == 0
            before = history(directory)
            pause = rng.uniform(0, 8) if early else rng.uniform(0, 0.5)
            deadline = time.monotonic() + SECONDS_TO_FIRST_STEP
            while not early and process.poll() is None and time.monotonic() < deadline:
                now = history(directory)
                if now and now[-1] != (before[-1] if before else None):
                    break
                time.sleep(0.01)
            try:
                process.wait(pause)
            except subprocess.TimeoutExpired:
                kill_tree(process)
                done += 1
                all_lines += history(directory)
                continue
        code = process.wait()
        if code != 0:
            raise SystemExit(
                f"{name} exited with {code}:\n{(recipe.parent / f'{name}.log').read_text()[-3000:]}"
            )
        final = history(directory)
        return final, all_lines + final, done


def compare(directory: Path, kills: int, same_world_kills: int, seed: int, epochs: int) -> dict[str, Any]:
    rng = random.Random(seed)
    steps = epochs * 64 // BATCH
    recipe = make_phased_run(
        directory,
        steps=steps - steps // 5,
        more=steps // 5,
        store={"sequences": 64, "held_out": 0, "replay_layers": 1},
        **TRAIN,
        epochs=epochs,
    )
    for name in ("alone", "changing", "two", "two_killed"):
        shutil.copytree(directory / "runs" / "tiny", directory / "runs" / name)
    reference = run_to_end(recipe, "alone", 1)
    samples = {line["step"]: line["samples"] for line in reference}
    final, all_lines, changing_kills = killed(recipe, "changing", WORLDS, kills, rng)
    two = run_to_end(recipe, "two", 2)
    two_final, two_lines, two_kills = killed(recipe, "two_killed", (2,), same_world_kills, rng)
    exact = (*TERMS, "gradient_norm", "learning_rate", "samples")
    values = {line["step"]: [line[name] for name in exact] for line in two}
    different = [line["step"] for line in all_lines if line["samples"] != samples[line["step"]]]
    unequal = [line["step"] for line in two_lines if [line[name] for name in exact] != values[line["step"]]]
    logged = [line["step"] for line in reference]
    return {
        "kills": changing_kills + two_kills,
        "kills_at_changing_world_sizes": changing_kills,
        "steps": len(logged),
        "epochs": len(logged) * BATCH / 64,
        "log_complete": logged == [line["step"] for line in final] == [line["step"] for line in two_final],
        "steps_with_other_samples": different,
        "steps_with_other_losses": unequal,
        "largest_loss_difference_across_worlds": max(
            abs(a["loss"] - b["loss"]) for a, b in zip(reference, final, strict=False)
        ),
    }


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--kills", type=int, default=30, help="number of kills at changing world sizes")
    parser.add_argument("--same-world-kills", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=100, help="epochs of 64 sequences in batches of 12")
    parser.add_argument("--directory", type=Path, help="directory of the runs, kept; default: temporary")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = compare(
            options.directory or Path(temporary),
            options.kills,
            options.same_world_kills,
            options.seed,
            options.epochs,
        )
    print(json.dumps(result))
    equal = result["log_complete"] and not (
        result["steps_with_other_samples"] or result["steps_with_other_losses"]
    )
    sys.exit(0 if equal and result["kills_at_changing_world_sizes"] >= options.kills else 1)


if __name__ == "__main__":
    main()
