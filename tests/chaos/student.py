"""Kills student training at random moments, at changing world sizes, and compares it with runs left alone.

    python -m tests.chaos.student --kills 30 [--epochs N] [--directory DIR] [--seed N]

The loss is the triple loss with relations, from a store whose top layer is replayed. The last fifth of the
steps is a phase on a second store, whose sequences are twice as long.

1. One rank, never killed: the reference log of sample digests and losses.
2. World sizes 1, 2, 1, 3, ... with SIGKILL of all processes at random moments: every step's digest of all
   samples consumed so far must equal the reference.
3. Two ranks never killed against two ranks killed: the losses must be bit-equal too.

Prints one JSON line; exits 1 where anything differs.
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
    """The command as a user would start it, in a session of its own; output goes beside the recipe."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    launch += ["--master_port", str(free_port())]
    script = [str(ROOT / "student_train" / "main.py"), "--recipe", str(recipe), f"name={name}"]
    command = [*launch, *script] if ranks > 1 else [sys.executable, *script]
    with (recipe.parent / f"{name}.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and all ranks; torchrun starts them in sessions of their own."""
    family = psutil.Process(process.pid)
    everyone = [family, *family.children(recursive=True)]
    for member in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(everyone)


def history(directory: Path) -> list[dict[str, Any]]:
    """The logged steps; a line cut short by a kill is left out."""
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


def whole(recipe: Path, name: str, ranks: int) -> list[dict[str, Any]]:
    process = start(recipe, name, ranks)
    if process.wait() != 0:
        raise SystemExit(f"{name} failed:\n{(recipe.parent / f'{name}.log').read_text()[-3000:]}")
    return history(recipe.parent / "runs" / name)


def killed(
    recipe: Path, name: str, worlds: tuple[int, ...], kills: int, dice: random.Random
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Runs to the end with ``kills`` SIGKILLs. Final log, every line ever logged, kills done.

    A kill comes a random moment after the run has logged something new, or, every fifth, at a random moment
    of the start. Two starts are needed for one kill at most, so the run always gets on.
    """
    directory = recipe.parent / "runs" / name
    ever: list[dict[str, Any]] = []
    done = attempts = 0
    while True:
        process = start(recipe, name, worlds[attempts % len(worlds)])
        attempts += 1
        if done < kills:
            early = attempts % 5 == 0
            before = history(directory)
            pause = dice.uniform(0, 8) if early else dice.uniform(0, 0.5)
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
                ever += history(directory)
                continue
        code = process.wait()
        if code != 0:
            raise SystemExit(
                f"{name} exited with {code}:\n{(recipe.parent / f'{name}.log').read_text()[-3000:]}"
            )
        final = history(directory)
        return final, ever + final, done


def compare(directory: Path, kills: int, same_world_kills: int, seed: int, epochs: int) -> dict[str, Any]:
    dice = random.Random(seed)
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
    reference = whole(recipe, "alone", 1)
    samples = {line["step"]: line["samples"] for line in reference}
    final, ever, changing_kills = killed(recipe, "changing", WORLDS, kills, dice)
    two = whole(recipe, "two", 2)
    two_final, two_ever, two_kills = killed(recipe, "two_killed", (2,), same_world_kills, dice)
    exact = (*TERMS, "gradient_norm", "learning_rate", "samples")
    values = {line["step"]: [line[name] for name in exact] for line in two}
    different = [line["step"] for line in ever if line["samples"] != samples[line["step"]]]
    unequal = [line["step"] for line in two_ever if [line[name] for name in exact] != values[line["step"]]]
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
    parser.add_argument("--kills", type=int, default=30, help="at changing world sizes")
    parser.add_argument("--same-world-kills", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=100, help="of 64 sequences in batches of 12")
    parser.add_argument("--directory", type=Path, help="kept afterwards; default: a temporary one")
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
    good = result["log_complete"] and not (
        result["steps_with_other_samples"] or result["steps_with_other_losses"]
    )
    sys.exit(0 if good and result["kills_at_changing_world_sizes"] >= options.kills else 1)


if __name__ == "__main__":
    main()
