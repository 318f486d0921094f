"""``python -m tests.chaos.forks [KILLS]``: hundreds of SIGKILLs a minute must not change a byte of a store.

Ray needs seconds to start a worker, so ``python -m tests.chaos`` kills only a few per minute. Here one, two
or four workers at a time are forked from a process that has imported everything. A worker does one item. Most
workers are killed at a random moment, and sometimes two workers do the same item. Often the whole pass,
driver and workers, is killed. Prints a table; exits 1 if a store differs from that of an undisturbed pass.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401 - one thread, no network
from infra.console import table
from infra.errors import UserError
from infra.files.locks import exclusive
from infra.settings.recipe import Recipe
from infra.settings.recipe_file import load_recipe
from offline_teacher.cluster.crews import Crew
from offline_teacher.cluster.work_queue import Item
from offline_teacher.inference import columns, teacher  # noqa: F401 - imported once, before the forks
from offline_teacher.inputs.source import find_source, spec_of
from offline_teacher.running.teacher_pass import parts_of, run_pass
from offline_teacher.verification.verify import verify
from tests.chaos.arguments import described
from tests.offline_teacher.local_pool import LocalCluster, LocalPool, make
from tests.offline_teacher.stores import contents
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text

WORKERS = (1, 2, 4)
WORKER_KILLS, DUPLICATES, PASS_KILLS = 0.6, 0.1, 0.8
"""Shares of workers that are killed, of items given to two workers, and of passes that are killed."""


def main() -> int:
    parser = described(__doc__)
    parser.add_argument("kills", nargs="?", type=int, default=100, metavar="KILLS")
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        text = write_text(directory / "text.txt", 300)
        model = directory / "model"
        _in_child(lambda: save_bert(model))
        recipe = write_recipe(directory, text, model, masking={"epochs": 2})
        _in_child(lambda: make(recipe))
        reference = contents(directory / "runs/tiny/store")
        rows: list[list[object]] = []
        for workers in WORKERS:
            rows.append(_make_with_kills(recipe, directory, reference, workers, -(-kills // len(WORKERS))))
    total = sum(int(str(row[1])) + int(str(row[2])) for row in rows)
    print(table(rows, ["workers", "workers killed", "passes killed", "stores", "identical and whole"]))
    print(f"{total} killed, {len(reference)} files in a store")
    return 0 if all(row[-1] for row in rows) and total >= kills else 1


def _make_with_kills(
    recipe: Path, directory: Path, reference: dict[str, bytes], workers: int, kills: int
) -> list:
    """Makes stores, one at a time, until ``kills`` workers and passes were killed; returns a table row."""
    rng, tally, passes, stores, same = random.Random(workers), directory / "tally", 0, 0, True
    tally.write_bytes(b"")
    while tally.stat().st_size + passes < kills:
        output = directory / f"killed-{workers}"
        status = -1
        while status != 0:
            driver = _fork(
                partial(_drive, recipe, output, workers, rng.randrange(1 << 30), tally), apart=True
            )
            if rng.random() < PASS_KILLS:
                time.sleep(rng.uniform(0.1, 10.0))  # a random moment, not a synchronisation
                os.killpg(driver, signal.SIGKILL)
            _, status = os.waitpid(driver, 0)
            _wait_until_free(output / "tiny/store")
            passes += os.WIFSIGNALED(status)
            assert status == 0 or os.WIFSIGNALED(status), "the pass failed, see above"
        store = output / "tiny/store"
        stores, same = stores + 1, same and contents(store) == reference and verify(str(store)) == []
        shutil.rmtree(output)
    return [workers, tally.stat().st_size, passes, stores, same]


def _drive(recipe: Path, output: Path, workers: int, seed: int, tally: Path) -> None:
    """Runs a pass whose workers are killed at random."""
    tempfile.tempdir = str(recipe.parent)
    source, decided = find_source(load_recipe(str(recipe), [f"output={output}"]))
    parts = parts_of(decided)
    cluster = ForkedCluster(decided, workers, random.Random(seed), tally)
    run_pass(decided, source, spec_of(decided, source, parts), parts, cluster)


class ForkedCluster(LocalCluster):
    """A cluster whose workers are forked from this process."""

    def __init__(self, recipe: Recipe, workers: int, rng: random.Random, tally: Path) -> None:
        super().__init__(recipe)
        self._make = partial(ForkedPool, workers=workers, rng=rng, tally=tally)

    def pool(self, crew: Crew, started: Any = None) -> Any:
        return self._make(crew)


class ForkedPool(LocalPool):
    """Runs each item in a separate process, sometimes in two, and again if the process was killed."""

    def __init__(self, crew: Crew, workers: int, rng: random.Random, tally: Path) -> None:
        super().__init__(crew)
        self._count, self._rng, self._tally = workers, rng, tally
        self._seconds = 0.2
        """Duration of the last item in seconds."""

    def run(self, items: Any, done: Any, waiting: Any, quarantine: Any = None) -> list[Item]:
        left = {item.name: item for item in items}
        todo = deque(left.values())
        running: dict[int, tuple[Item, float, float]] = {}  # process id -> item, start time, time of its kill
        while left:
            while len(running) < self._count and todo:
                duplicate = self._rng.random() < DUPLICATES and self._count > 1
                item = todo[0] if duplicate else todo.popleft()
                start, is_killed = time.monotonic(), self._rng.random() < WORKER_KILLS
                kill_time = start + self._rng.uniform(0, 2 * self._seconds) if is_killed else float("inf")
                running[_fork(partial(self._do, item))] = item, start, kill_time
            for process, (item, start, kill_time) in list(running.items()):
                if time.monotonic() >= kill_time:
                    os.kill(process, signal.SIGKILL)
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    del running[process]
                    self._settle_fork(item, status, left, todo, done)
                    self._seconds = time.monotonic() - start if status == 0 else self._seconds
            time.sleep(0.002)
        for process in running:  # the slower of two processes of one item
            os.waitpid(process, 0)
        return []

    def _settle_fork(self, item: Item, status: int, left: dict, todo: deque, done: Any) -> None:
        if status == 0:
            if left.pop(item.name, None) is not None:
                done(item, {**json.loads(self._answer(item).read_text()), "place": "a fork"})
            return
        assert os.WIFSIGNALED(status), "a worker failed, see above"
        with self._tally.open("ab") as file:
            file.write(b".")
        if item.name in left and item not in todo:
            todo.append(item)

    def _do(self, item: Item) -> None:
        answer = getattr(self.worker, item.method)(*item.arguments)
        draft = self._answer(item).with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(answer))
        draft.rename(self._answer(item))

    def _answer(self, item: Item) -> Path:
        return self._tally.with_name(f"answer-{item.name.replace('/', '-')}")


def _fork(function: Callable[[], object], apart: bool = False) -> int:
    """Forks a child and returns its id. ``apart``: in a new process group, to kill it with its children."""
    process = os.fork()
    if apart:
        os.setpgid(process, process)  # called in parent and child, since either may run first
    if process:
        return process
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _in_child(function: Callable[[], Any]) -> None:
    """Runs ``function`` in a child process, because this process must not have torch's threads when it
    forks."""
    _, status = os.waitpid(_fork(function), 0)
    assert status == 0


def _wait_until_free(store: Path) -> None:
    """Waits until all processes of a killed pass have ended, since they hold the store's lock."""
    while store.exists():
        try:
            with exclusive(str(store)):
                return
        except UserError:
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
