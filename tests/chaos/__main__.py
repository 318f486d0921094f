"""``python -m tests.chaos [KILLS]``: random SIGKILLs, a lost node and flipped bits must not change a byte.

1. One worker makes a reference store without faults.
2. 1, 2 and 4 workers in turn make the same store while workers are killed at random moments, and every fifth
   time the driver. More stores are made until KILLS (default 100) processes were killed. A pass that
   quarantines a task because eight of its workers were killed (exit code 3) is started again.
3. 4 workers make the same store without faults.
4. A local cluster of three nodes makes the same store and loses one node meanwhile.
5. Random bits are flipped in random files: ``verify`` must find each; ``--repair`` must restore the bytes.

Prints a table; exits 1 if a row does not hold. Takes minutes.
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
"""Part of the message if Ray does not start within its own limit of 30 seconds."""

Row = list[object]
Bytes = dict[str, bytes]


def main() -> int:
    parser = described(__doc__)
    parser.add_argument("kills", nargs="?", type=int, default=100, metavar="KILLS")
    kills = parser.parse_args().kills
    rng = random.Random(0)
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
            *killed(recipe, directory, reference, kills, rng),
            undisturbed(recipe, directory, reference, 4),
            node_lost(recipe, directory, reference),
            *flipped(recipe, store, reference, rng),
        ]
    print(table(rows, ["what", "figure", "holds"]))
    return 0 if all(row[-1] for row in rows) else 1


def complete(recipe: Path, *overrides: str) -> None:
    """Makes the store without faults."""
    code, text = finish(start(recipe, *overrides))
    while OVERLOADED in text:
        code, text = finish(start(recipe, *overrides))
    assert code == 0, text


def killed(recipe: Path, directory: Path, reference: Bytes, kills: int, rng: random.Random) -> list[Row]:
    """Makes stores while processes are killed, until ``kills`` processes were killed; returns table rows."""
    killed_count = {"workers": 0, "drivers": 0}
    stores = same = given_up = 0
    while sum(killed_count.values()) < kills:
        output = directory / f"killed-{stores}"
        store, code, workers = output / "tiny/store", -1, WORKERS[stores % len(WORKERS)]
        while code != 0:
            process = start(recipe, f"output={output}", f"teacher.workers={workers}")
            _kill_at_random(process, store, kills, killed_count, rng)
            code, text = finish(process)
            assert code in (0, -9, EXIT_INCOMPLETE) or OVERLOADED in text, text
            given_up += code == EXIT_INCOMPLETE
            print(
                f"{killed_count['workers']} workers and {killed_count['drivers']} drivers killed, "
                f"{stores} stores, {workers} workers: exit code {code}",
                flush=True,
            )
        stores += 1
        same += contents(store) == reference
        shutil.rmtree(output)
    return [
        ["workers killed", killed_count["workers"], True],
        ["drivers killed", killed_count["drivers"], True],
        ["passes that gave a task up and went on", given_up, True],
        ["stores made meanwhile, identical", f"{same} of {stores}", same == stores >= len(WORKERS)],
    ]


def _kill_at_random(
    process: subprocess.Popen[str], store: Path, kills: int, killed_count: dict[str, int], rng: random.Random
) -> None:
    """Kills workers of ``process`` at random moments, until it ends or ``kills`` processes were killed.

    A kill comes a random time after a new file in the store; every seventh comes at any time. If all workers
    were killed before they finish anything, the pass could not end.
    """
    size = _files(store)
    while process.poll() is None and sum(killed_count.values()) < kills:
        if sum(killed_count.values()) % ANY_MOMENT_EVERY == 0:
            time.sleep(rng.uniform(0.0, 5.0))  # a random moment, not a synchronisation
        else:
            while process.poll() is None and _files(store) <= size:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.5))
        size = _files(store)
        try:
            targets = workers(process.pid)
            if not targets:
                continue
            if sum(killed_count.values()) % DRIVER_EVERY == DRIVER_EVERY - 1:
                process.kill()
                killed_count["drivers"] += 1
                return
            rng.choice(targets).kill()
            killed_count["workers"] += 1
        except psutil.NoSuchProcess:
            continue


def _files(store: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(store))


def undisturbed(recipe: Path, directory: Path, reference: Bytes, count: int) -> Row:
    complete(recipe, f"output={directory}/many", f"teacher.workers={count}")
    return [f"store of {count} workers, identical", "", contents(directory / "many/tiny/store") == reference]


def node_lost(recipe: Path, directory: Path, reference: Bytes) -> Row:
    """Runs a pass on three nodes with one CPU each, one of which is removed after the first tasks."""
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


def flipped(recipe: Path, store: Path, reference: Bytes, rng: random.Random) -> list[Row]:
    """Flips one bit in a file with a digest, many times; then damages several files at once and repairs
    them."""
    no_digest = (storage.LOCK, RECIPE)
    files = sorted(path for path in store.rglob("*") if path.is_file() and path.name not in no_digest)
    noticed = sum(_is_noticed(store, rng.choice(files), rng) for _ in range(FLIPS))
    restored = 0
    for _ in range(REPAIRS):
        for path in rng.sample([store / name for name in sorted(reference)], 5):
            _flip(path, rng)
        code = teacher(["verify", str(store), "--repair", "--recipe", str(recipe)])
        restored += code == 0 and contents(store) == reference and not verify(str(store))
        shutil.rmtree(damaged_directory(str(store)))
    return [
        ["bit flips found by verify", f"{noticed} of {FLIPS}", noticed == FLIPS],
        [
            "repairs of 5 damaged files that restored every byte",
            f"{restored} of {REPAIRS}",
            restored == REPAIRS,
        ],
    ]


def _is_noticed(store: Path, path: Path, rng: random.Random) -> bool:
    """Flips a bit of a file and restores it; returns whether ``verify`` names the file in between."""
    data = path.read_bytes()
    _flip(path, rng)
    name = str(path.relative_to(store))
    findings = {finding.file for finding in verify(str(store))}
    path.write_bytes(data)
    return name in findings


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
