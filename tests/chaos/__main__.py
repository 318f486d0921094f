"""``python -m tests.chaos [KILLS]``: random SIGKILLs, a lost node and flipped bits must not change a byte.

1. A reference store from one undisturbed worker.
2. The same from 1, 2 and 4 workers in turn while workers, and every fifth time the driver, are killed at
   random moments; stores are made again and again until KILLS (default 100) processes have fallen. A pass
   that gives a task up because eight workers were killed over it (exit code 3) is told to go on.
3. The same from 4 workers, undisturbed.
4. The same on a local cluster of three nodes, one of which is lost on the way.
5. Random bits are flipped in random files: ``verify`` must find each; ``--repair`` must restore the bytes.

Prints a table of figures; exits 1 where any of it does not hold. Takes minutes.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from infra.console import table
from infra.errors import EXIT_INCOMPLETE
from infra.files import storage
from offline_teacher.main import main as teacher
from offline_teacher.store.paths import RECIPE
from offline_teacher.verification.repair import damaged_directory
from offline_teacher.verification.verify import verify
from tests.chaos.arguments import described
from tests.offline_teacher.stores import contents, finish, indices, start, wait_until, workers
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text

FLIPS = 1_000
REPAIRS = 3
DRIVER_EVERY = 5
ANY_MOMENT_EVERY = 7
WORKERS = (1, 2, 4)
OVERLOADED = "the machine is overloaded: the same command tries again"
"""Ray gives itself 30 seconds to start."""

Row = list[object]
Bytes = dict[str, bytes]


def main() -> int:
    parser = described(__doc__)
    parser.add_argument("kills", nargs="?", type=int, default=100, metavar="KILLS")
    kills = parser.parse_args().kills
    luck = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        recipe = write_recipe(
            directory,
            write_text(directory / "text.txt", 800),
            save_bert(directory / "model"),
            masking={"epochs": 2},
        )
        complete(recipe)
        store = directory / "runs/tiny/store"
        reference = contents(store)
        rows = [
            ["files of the reference store", len(reference), True],
            *killed(recipe, directory, reference, kills, luck),
            undisturbed(recipe, directory, reference, 4),
            node_lost(recipe, directory, reference),
            *flipped(recipe, store, reference, luck),
        ]
    print(table(rows, ["what", "figure", "holds"]))
    return 0 if all(row[-1] for row in rows) else 1


def complete(recipe: Path, *overrides: str) -> None:
    """The store, made without disturbance."""
    code, text = finish(start(recipe, *overrides))
    while OVERLOADED in text:
        code, text = finish(start(recipe, *overrides))
    assert code == 0, text


def killed(recipe: Path, directory: Path, reference: Bytes, kills: int, luck: random.Random) -> list[Row]:
    """Stores made under fire until ``kills`` processes have fallen."""
    fallen = {"workers": 0, "drivers": 0}
    stores = same = given_up = 0
    while sum(fallen.values()) < kills:
        output = directory / f"killed-{stores}"
        store, code, workers = output / "tiny/store", -1, WORKERS[stores % len(WORKERS)]
        while code != 0:
            process = start(recipe, f"output={output}", f"teacher.workers={workers}")
            _shoot(process, store, kills, fallen, luck)
            code, text = finish(process)
            assert code in (0, -9, EXIT_INCOMPLETE) or OVERLOADED in text, text
            given_up += code == EXIT_INCOMPLETE
            print(
                f"{fallen['workers']} workers and {fallen['drivers']} drivers killed, {stores} stores, "
                f"{workers} workers: exit code {code}",
                flush=True,
            )
        stores += 1
        same += contents(store) == reference
        shutil.rmtree(output)
    return [
        ["workers killed", fallen["workers"], True],
        ["drivers killed", fallen["drivers"], True],
        ["passes that gave a task up and went on", given_up, True],
        ["stores made meanwhile, identical", f"{same} of {stores}", same == stores >= len(WORKERS)],
    ]


def _shoot(
    process: subprocess.Popen[str], store: Path, kills: int, fallen: dict[str, int], luck: random.Random
) -> None:
    """Kills workers of ``process`` at random moments until it ends or dies, or enough have fallen.

    A kill comes a random moment after the store has grown by a file, every seventh at any moment at all: were
    each worker shot before it has done anything, the pass would rightly never end.
    """
    size = _files(store)
    while process.poll() is None and sum(fallen.values()) < kills:
        if sum(fallen.values()) % ANY_MOMENT_EVERY == 0:
            time.sleep(luck.uniform(0.0, 5.0))  # a random moment, not a synchronisation
        else:
            while process.poll() is None and _files(store) <= size:
                time.sleep(0.005)
            time.sleep(luck.uniform(0.0, 0.5))
        size = _files(store)
        try:
            targets = workers(process.pid)
            if not targets:
                continue
            if sum(fallen.values()) % DRIVER_EVERY == DRIVER_EVERY - 1:
                process.kill()
                fallen["drivers"] += 1
                return
            luck.choice(targets).kill()
            fallen["workers"] += 1
        except psutil.NoSuchProcess:
            continue


def _files(store: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(store))


def undisturbed(recipe: Path, directory: Path, reference: Bytes, count: int) -> Row:
    complete(recipe, f"output={directory}/many", f"teacher.workers={count}")
    return [f"store of {count} workers, identical", "", contents(directory / "many/tiny/store") == reference]


def node_lost(recipe: Path, directory: Path, reference: Bytes) -> Row:
    """Three nodes with a CPU each; one that runs a worker goes down after the first tasks."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        others = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        store = directory / "nodes/tiny/store"
        process = start(
            recipe,
            f"output={directory}/nodes",
            "teacher.workers=3",
            f"teacher.ray_address={cluster.address}",
        )
        wait_until(lambda: len(indices(store)) > 2, process)
        cluster.remove_node(others[0], allow_graceful=False)
        before = len(indices(store))
        code, text = finish(process)
        assert code == 0, text
    finally:
        cluster.shutdown()
    return [f"store, a node of three lost after {before} tasks, identical", "", contents(store) == reference]


def flipped(recipe: Path, store: Path, reference: Bytes, luck: random.Random) -> list[Row]:
    """One bit at a time in any file that a digest covers; then several files at once, repaired."""
    apart = (storage.LOCK, RECIPE)
    files = sorted(path for path in store.rglob("*") if path.is_file() and path.name not in apart)
    found = sum(_found(store, luck.choice(files), luck) for _ in range(FLIPS))
    restored = 0
    for _ in range(REPAIRS):
        for path in luck.sample([store / name for name in sorted(reference)], 5):
            _flip(path, luck)
        code = teacher(["verify", str(store), "--repair", "--recipe", str(recipe)])
        restored += code == 0 and contents(store) == reference and not verify(str(store))
        shutil.rmtree(damaged_directory(str(store)))
    return [
        ["bit flips found by verify", f"{found} of {FLIPS}", found == FLIPS],
        [
            "repairs of 5 damaged files that restored every byte",
            f"{restored} of {REPAIRS}",
            restored == REPAIRS,
        ],
    ]


def _found(store: Path, path: Path, luck: random.Random) -> bool:
    data = path.read_bytes()
    _flip(path, luck)
    name = str(path.relative_to(store))
    findings = {finding.file for finding in verify(str(store))}
    path.write_bytes(data)
    return name in findings


def _flip(path: Path, luck: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[luck.randrange(len(data))] ^= 1 << luck.randrange(8)
    path.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
