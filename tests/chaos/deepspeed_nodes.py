"""``python -m tests.chaos.deepspeed_nodes``: runs the documented DeepSpeed commands. Needs root.

Three machines in network namespaces (`tests.chaos.hosts`), reached by ssh and pdsh:

1. One machine with two ranks makes the reference log of sample digests.
2. ``deepspeed --hostfile`` on two machines with one rank each must log the same digests at every step.
3. So must two machines at ZeRO stage 1, with ``infra/deploy/deepspeed/zero1.json``.
4. One of two machines loses all its processes half-way, and the command ends. With the third machine in the
   hostfile, the command resumes from the newest checkpoint; samples, losses and weights must be as in 2.

Prints a table; exits 1 if a row does not hold. About 9 minutes.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infra.console import command, table
from infra.errors import UserError
from tests.chaos.arguments import described
from tests.chaos.hosts import Machine, Machines
from tests.chaos.student import history
from tests.offline_teacher.stores import wait_until
from tests.student_train.tiny_run import make_run

NODES = ("node-0", "node-1", "node-2")
EXACT = ("loss", "kl", "mlm", "cosine", "gradient_norm", "learning_rate", "samples")
STEPS_BEFORE_THE_KILL = 8
NOISE = 1e-3
"""Largest difference of a loss near 14 after 32 steps, if float32 sums have another order."""
MINUTES = 600.0

Row = list[object]
Log = list[dict[str, Any]]


def main() -> int:
    described(__doc__).parse_args()
    if shutil.which("pdsh") is None:
        raise UserError("the deepspeed launcher starts its nodes with pdsh; apt-get install pdsh")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "machines")
        with Machines(NODES, directory) as machines:
            train = {"epochs": 6, "batch_size": 12, "micro_batch_size": 2, "checkpoint_every": 3}
            recipe = make_run(directory, sequences=64, masking_epochs=2, held_out=0, recipe={"train": train})
            for name in ("one", "two", "zero", "lost"):
                shutil.copytree(directory / "runs/tiny", directory / "runs" / name)
            alone = ["--num_accelerators", "2"]
            pair = _hosts(directory, NODES[:2])
            stage = ["train.deepspeed_config=infra/deploy/deepspeed/zero1.json", "train.zero_stage=1"]
            one = _whole(machines[NODES[0]], recipe, "one", alone)
            two = _whole(machines[NODES[0]], recipe, "two", pair)
            zero = _whole(machines[NODES[0]], recipe, "zero", pair, *stage)
            rows = [
                ["one machine, two ranks: steps", len(one), len(one) == 32],
                _same("two machines: steps with the same samples", one, two, ["samples"]),
                _near("two machines: largest difference of a loss", one, two),
                _same("two machines, ZeRO 1: steps with the same samples", one, zero, ["samples"]),
                *_node_lost(machines, directory, recipe, pair, two),
            ]
    print(table(rows, ["what", "figure", "holds"]))
    return 0 if all(row[-1] for row in rows) else 1


def _hosts(directory: Path, names: Iterable[str]) -> list[str]:
    path = directory / f"hostfile-{'-'.join(names)}"
    path.write_text("".join(f"{name} slots=1\n" for name in names))
    return ["--hostfile", str(path)]


def _command(recipe: Path, name: str, where: list[str], *overrides: str) -> list[str]:
    script = ["student_train/main.py", "--recipe", str(recipe), f"name={name}", *overrides]
    return [str(Path(sys.executable).parent / "deepspeed"), *where, *script]


def _whole(machine: Machine, recipe: Path, name: str, where: list[str], *overrides: str) -> Log:
    begin = time.monotonic()
    output = machine.must(_command(recipe, name, where, *overrides), MINUTES)
    print(f"{name}: {time.monotonic() - begin:.0f} s\n{_telling(output)}", flush=True)
    return history(recipe.parent / "runs" / name)


def _same(what: str, one: Log, other: Log, fields: Iterable[str]) -> Row:
    """Returns a row with the number of steps that agree in all ``fields``."""
    values = [[line[field] for field in ("step", *fields)] for line in one]
    others = [[line[field] for field in ("step", *fields)] for line in other]
    equal = sum(a == b for a, b in zip(values, others, strict=False))
    return [what, f"{equal} of {len(values)}", values == others]


def _near(what: str, one: Log, other: Log) -> Row:
    """Returns a row with the largest difference of a loss. It is not 0, because DeepSpeed adds through shared
    memory on one machine, in another order than gloo."""
    largest = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True))
    return [what, f"{largest:.1e}", largest < NOISE]


def _node_lost(machines: Machines, directory: Path, recipe: Path, pair: list[str], two: Log) -> list[Row]:
    run = directory / "runs/lost"
    log = directory / "lost.log"
    process = machines[NODES[0]].start(_command(recipe, "lost", pair), log)
    wait_until(lambda: len(history(run)) >= STEPS_BEFORE_THE_KILL, process)
    machines[NODES[1]].kill()
    begin = time.monotonic()
    code = process.wait(MINUTES)
    seconds, done = time.monotonic() - begin, len(history(run))
    print(f"lost, after {seconds:.0f} s exit code {code}:\n{_telling(log.read_text())}", flush=True)
    resumed = _whole(machines[NODES[0]], recipe, "lost", _hosts(directory, (NODES[0], NODES[2])))
    return [
        ["machine lost: step it came to", f"{done} of {len(two)}", code != 0 and done < len(two)],
        _same("on another machine: steps with the same samples", two, resumed, ["samples"]),
        _same("on another machine: steps with the same losses, bit for bit", two, resumed, EXACT),
        [
            "on another machine: weights the same, bit for bit",
            "",
            _weights(run) == _weights(directory / "runs/two"),
        ],
    ]


def _weights(run: Path) -> dict[str, str]:
    """Returns file -> digest of the model's weight files, from the student's record."""
    files = json.loads((run / "student/model.json").read_text())["files"]
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def _telling(output: str) -> str:
    """Returns the lines with the launcher's addresses, the trainer's messages and errors."""
    words = ("cmd = ", "dist_world_size", "global_rank_mapping", "student", "Error", "exit")
    lines = [line[:200] for line in output.splitlines() if any(word in line for word in words)]
    return "\n".join(f"  {line}" for line in lines[:8] + lines[8:][-12:])


if __name__ == "__main__":
    command(main)
