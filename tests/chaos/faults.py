"""``python -m tests.chaos.faults [ROW ...]``: causes faults, one at a time, on a Ray cluster. Needs root.

It starts three machines in network namespaces (`tests.chaos.fault_bench`). node-0 runs Ray's head, an S3
server and the driver; node-1 and node-2 have one worker each. Most faults happen on node-2, which has its own
proxy to the object store, its own hub, and a small disk. After each fault the store must equal, byte for
byte, the store of one process without faults, unless the row says that the pass must not finish.

Prints the table of docs/faults.md; exits 1 if a row does not hold. About 20 minutes on an idle machine.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from infra.console import command, table
from infra.errors import EXIT_INCOMPLETE, EXIT_USER_ERROR
from tests.chaos.arguments import described
from tests.chaos.fault_bench import (
    BUCKET,
    HEAD,
    SCRATCH,
    SECONDS,
    SICK,
    WELL,
    Bench,
    environment_of,
    opened,
    until,
)
from tests.conftest import ROOT
from tests.offline_teacher.stores import contents, indices
from tests.offline_teacher.tiny_teacher import WORDS, save_bert, write_text

REDUCE_RATE = "Please reduce your request rate"
"""S3's message with HTTP status 503."""
MODEL = "example/tiny-bert"
OTHER_PYTHON = Path("/usr/bin/python3.11")

Row = list[object]


def main() -> int:
    parser = described(__doc__)
    names = [row.__name__ for row in ROWS]
    parser.add_argument("rows", nargs="*", choices=names, metavar="ROW", help=", ".join(names))
    chosen = parser.parse_args().rows or names
    rows: list[Row] = []
    with opened() as bench:
        for row in (row for row in ROWS if row.__name__ in chosen):
            rows += _tried(row, bench)
            print(rows[-1], flush=True)
    print(table(rows, ["fault", "what was seen", "holds"]))
    return 0 if all(row[-1] for row in rows) else 1


def _tried(row: Callable[[Bench], list[Row]], bench: Bench) -> list[Row]:
    """Returns the rows of a fault, or a row with its error, so that the next fault is tried in any case."""
    try:
        return row(bench)
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return [[row.__name__, f"{type(error).__name__}: {error}"[:300], False]]


def _line(output: str, *words: str) -> str:
    """Returns the first line of the output that has all of these words, or an empty text."""
    matching = (line for line in output.splitlines() if all(word in line for word in words))
    return next(matching, "")


def other_python(bench: Bench) -> list[Row]:
    """Lets a node with another patch version of Python join; Ray refuses it and prints both versions."""
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    words = [
        str(OTHER_PYTHON),
        "-m",
        "ray.scripts.scripts",
        "start",
        f"--address={HEAD}:6379",
        "--num-cpus=1",
    ]
    environment = environment_of(WELL) | {"PYTHONPATH": f"{packages}:{ROOT}"}
    code, output = bench.machines[WELL].run(words, SECONDS, **environment)
    print(output, flush=True)
    refused = code != 0 and "Version mismatch" in output
    versions = " / ".join(re.findall(r"Python: (\S+)", output))
    return [["Python of another version joins", f"ray start: Version mismatch, {versions}", refused]]


def poisoned(bench: Bench) -> list[Row]:
    """Makes the embedding of one word NaN, and uses this word in one line of the text."""
    model = save_bert(bench.directory / "poisoned-model")
    weights = load_file(model / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][5 + WORDS.index("bab")] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    text = write_text(bench.directory / "poisoned.txt", 80)
    lines = [line.replace("bab", "bad") for line in text.read_text().splitlines()]
    text.write_text("\n".join([*lines[:40], "bab " * 20, *lines[40:]]))
    overrides = ["store.top_k=0", "masking.probability=0.01", f"corpus.path={text}", f"teacher.model={model}"]
    made = bench.begin("poisoned", *overrides)
    code, output = made.end()
    line = _line(output, "quarantined: task", "node-", "hidden_states")
    holds = code == EXIT_INCOMPLETE and bool(line) and made.logged("Traceback", "node-", "cpu")
    return [["a shard is poisoned (NaN)", f"exit {code}; {line}", holds]]


def disk_full(bench: Bench) -> list[Row]:
    """Gives the sick node a disk of one page for temporary files; the store is in the object store."""
    bench.sick.must(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", SCRATCH])
    made = bench.begin("full", f"store.path=s3://{BUCKET}/full")
    code, output = made.end()
    bench.sick.must(["umount", "-l", SCRATCH])
    line = _line(output, SICK, "disk is full")
    holds = code == 0 and bool(line) and bench.remote("full") == bench.reference
    return [
        ["the disk of a node is full", f"exit {code}, same store; {line}", holds and made.logged("Traceback")]
    ]


def object_store_503(bench: Bench) -> list[Row]:
    """Lets the object store answer the sick node with 503 for a minute, from the first task on."""
    made = bench.begin("refused", f"store.path=s3://{BUCKET}/refused")
    until(lambda: "tasks" in made.log.read_text() or made.process.poll() is not None)
    flag = bench.flag("503")
    flag.touch()
    deadline = time.monotonic() + 60.0
    until(lambda: time.monotonic() > deadline)
    flag.unlink()
    code, output = made.end()
    line = _line(output, SICK, REDUCE_RATE)
    holds = code == 0 and bench.remote("refused") == bench.reference
    return [
        [
            "the object store answers one node 503 for a minute",
            f"exit {code}, same store; {line}",
            holds and bool(line),
        ]
    ]


def hub_refuses(bench: Bench) -> list[Row]:
    bench.flag("429").touch()
    made = bench.begin("hub", f"teacher.model={MODEL}")
    code, output = made.end()
    line = _line(output, SICK, MODEL, "429")
    holds = code == 0 and bool(line) and contents(made.store) == bench.reference
    return [["the hub refuses one worker (429)", f"exit {code}, same store; {line}", holds]]


def hung(bench: Bench) -> list[Row]:
    """Stops the sick node's worker by SIGSTOP after ten tasks, whose durations set the deadlines."""
    made = bench.begin("hung")
    made.until_tasks(10)
    bench.until_sick_works(made)
    bench.sick.must(["pkill", "--signal", "STOP", "--full", "ray::infer"])
    before, stopped = len(indices(made.store)), time.monotonic()
    code, output = made.end()
    line = _line(output, SICK, "no answer in time")
    holds = code == 0 and bool(line) and contents(made.store) == bench.reference
    after = f"{time.monotonic() - stopped:.0f} s after it, with {before} tasks done before"
    return [["a worker hangs (SIGSTOP)", f"exit {code} {after}, same store; {line}", holds]]


def node_lost(bench: Bench) -> list[Row]:
    made = bench.begin("lost")
    bench.until_sick_works(made)
    before = len(indices(made.store))
    bench.sick.lose()
    code, output = made.end()
    line = _line(output, SICK, "train/")  # "died" or "no answer", depending on which is noticed first
    holds = code == 0 and bool(line) and contents(made.store) == bench.reference
    return [["a node is lost", f"exit {code}, same store, {before} tasks before it; {line}", holds]]


def head_lost(bench: Bench) -> list[Row]:
    """Kills Ray's head while the driver is on another machine, and repeats the command with a new head. The
    workers are stopped first, so that the pass cannot finish without a head."""
    made = bench.begin("headless", on=WELL)
    made.until_tasks(10)
    for number in (WELL, SICK):
        bench.machines[number].run(["pkill", "--signal", "STOP", "--full", "ray::"])
    bench.head.run(["pkill", "--signal", "KILL", "--full", "raylet|gcs_server"])
    code, output = made.end()
    bench.sick.run(
        ["pkill", "--signal", "CONT", "--full", "ray::"]
    )  # without a head, Ray ends the continued worker
    last = (output.strip().splitlines() or [""])[-1]
    kept = {path: path.stat().st_mtime_ns for path in indices(made.store)}
    bench.machines[WELL].run(["ray", "stop", "--force"], SECONDS)
    bench.head.run(["ray", "stop", "--force"], SECONDS)
    head = ["ray", "start", "--head", "--port=6379", "--num-cpus=2", "--disable-usage-stats"]
    bench.head.must([*head, "--include-dashboard=false"], SECONDS, **environment_of(HEAD))
    again = bench.begin("headless")
    second, _ = again.end()
    same = {path: path.stat().st_mtime_ns for path in kept} == kept
    reported = code == EXIT_USER_ERROR and last.startswith("error: the head of the Ray cluster at ")
    holds = reported and second == 0 and same and contents(made.store) == bench.reference
    seen = f"exit {code}: {last}; the same command: exit {second}, {len(kept)} tasks kept, same store"
    return [["the head is lost", seen, holds]]


ROWS = (other_python, poisoned, disk_full, object_store_503, hub_refuses, hung, node_lost, head_lost)

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command(main)
