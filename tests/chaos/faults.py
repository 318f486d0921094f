"""``python -m tests.chaos.faults [ROW ...]``: causes faults, one at a time, on a Ray cluster. Needs root.

It starts three machines in network namespaces (`tests.chaos.hosts`). node-0 runs Ray's head, an S3 server and
the driver; node-1 and node-2 have one worker each. Faults hit node-2: it has its own proxy to the object
store, its own hub, and a small disk. After each fault the store must equal, byte for byte, that of one
undisturbed process, unless the row says that the pass must not finish.

Prints the table of docs/faults.md; exits 1 if a row does not hold. About 20 minutes on an idle machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from infra.console import command, table
from infra.errors import EXIT_INCOMPLETE
from tests.chaos.hosts import Machine, Machines
from tests.conftest import ROOT
from tests.offline_teacher.local_pool import make
from tests.offline_teacher.stores import contents, indices, wait_until
from tests.offline_teacher.tiny_teacher import WORDS, save_bert, write_recipe, write_text

HEAD, WELL, SICK = "node-0", "node-1", "node-2"
LINES = 500
SECONDS = 900.0
S3_PORT, HUB_PORT, REFUSING_PORT, PROXY_PORT = 5555, 8000, 8001, 5556
MODEL = "somebody/tiny-bert"
BUCKET = "faults"
HUB_CACHE = str(Path(tempfile.gettempdir(), "hub"))
SCRATCH = str(Path(tempfile.gettempdir(), "scratch"))
"""For temporary files; on the machine whose disk fills up it is a disk of its own."""
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
PATIENT = {
    "RAY_health_check_period_ms": "5000",
    "RAY_health_check_timeout_ms": "20000",
    "RAY_health_check_failure_threshold": "4",
}
"""Longer timeouts: otherwise, on a busy machine, Ray declares a node dead that only waits for a CPU."""
OTHER_PYTHON = Path("/usr/bin/python3.11")

Row = list[object]


@dataclass
class Bench:
    """The cluster, and the contents that every pass's store must have at the end."""

    machines: Machines
    directory: Path
    recipe: Path
    reference: dict[str, bytes]

    @property
    def head(self) -> Machine:
        return self.machines[HEAD]

    @property
    def sick(self) -> Machine:
        return self.machines[SICK]

    def begin(self, name: str, *overrides: str, on: str = HEAD) -> Pass:
        """Starts a pass of the recipe on the cluster; its output is ``name`` unless overridden."""
        output = self.directory / name
        log = self.directory / f"{name}.log"
        words = ["python", "-m", "offline_teacher.main", "run", "--recipe", str(self.recipe)]
        words += [f"output={output}", "teacher.workers=2", f"teacher.ray_address={HEAD}:6379", *overrides]
        process = self.machines[on].start(words, log, **_environment(on))
        return Pass(process, log, output)


@dataclass
class Pass:
    process: subprocess.Popen[str]
    log: Path
    output: Path

    @property
    def store(self) -> Path:
        return self.output / "tiny/store"

    def end(self) -> tuple[int, str]:
        """Waits for the end. Returns exit code and output."""
        code = self.process.wait(SECONDS)
        print(f"{self.log.stem}: exit {code}\n{self.log.read_text()}", flush=True)
        return code, self.log.read_text()

    def until_tasks(self, count: int) -> None:
        wait_until(lambda: len(indices(self.store)) >= count, self.process)

    def logged(self, *words: str) -> bool:
        """Whether one of the pass's log files has all of these words."""
        logs = [path.read_text() for path in (self.output / "tiny/logs").glob("*.log")]
        return any(all(word in text for word in words) for text in logs)


def main() -> int:
    wanted = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "machines")
        with Machines([HEAD, WELL, SICK], directory) as machines:
            text = write_text(directory / "text.txt", LINES)
            model = save_bert(directory / "model")
            recipe = write_recipe(directory, text, model, masking={"epochs": 2})
            make(recipe)  # by one process, without Ray
            bench = Bench(machines, directory, recipe, contents(directory / "runs/tiny/store"))
            _services(bench)
            _cluster(bench)
            rows: list[Row] = []
            for row in ROWS:
                if not wanted or row.__name__ in wanted:
                    rows += row(bench)
                    print(rows[-1], flush=True)
    print(table(rows, ["fault", "what was seen", "holds"]))
    return 0 if all(row[-1] for row in rows) else 1


# --- the machines ---


def _environment(name: str) -> dict[str, str]:
    """Environment variables of Ray and of drivers on a machine."""
    sick = name == SICK
    s3 = f"http://127.0.0.1:{PROXY_PORT}" if sick else f"http://{HEAD}:{S3_PORT}"
    hub = f"http://{HEAD}:{REFUSING_PORT if sick else HUB_PORT}"
    own = {"AWS_ENDPOINT_URL": s3, "HF_ENDPOINT": hub, "HF_HOME": HUB_CACHE, "HF_HUB_OFFLINE": "0"}
    return {
        **KEYS,
        **own,
        **PATIENT,
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": tempfile.gettempdir(),
        "TMPDIR": SCRATCH,
    }


def _services(bench: Bench) -> None:
    """Starts the object store, the sick node's proxy to it, and two hubs."""
    python, log = sys.executable, bench.directory / "services.log"
    bench.head.start([python, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(S3_PORT)], log)
    hub = [python, "-m", "tests.chaos.services", "hub"]
    bench.head.start([*hub, str(HUB_PORT), str(bench.directory / "model")], log)
    bench.head.start([*hub, str(REFUSING_PORT), str(bench.directory / "model"), _flag(bench, "429")], log)
    proxy = [python, "-m", "tests.chaos.services", "proxy", str(PROXY_PORT), f"http://{HEAD}:{S3_PORT}"]
    bench.sick.start([*proxy, _flag(bench, "503")], log)
    for name in (HEAD, WELL, SICK):
        bench.machines[name].must(["mkdir", "-p", SCRATCH])
    make = f"import boto3; boto3.client('s3').create_bucket(Bucket='{BUCKET}')"
    _until(lambda: bench.head.run([python, "-c", make], **_environment(HEAD))[0] == 0)


def _flag(bench: Bench, name: str) -> str:
    """Path of a file. While it exists, a service answers with the HTTP status ``name``."""
    return str(bench.directory / name)


def _cluster(bench: Bench) -> None:
    common = ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000"]
    words = [
        "ray",
        "start",
        "--head",
        "--port=6379",
        "--num-cpus=0",
        "--include-dashboard=false",
        *common[1:],
    ]
    bench.head.must(words, SECONDS, **_environment(HEAD))
    for name in (WELL, SICK):
        join = ["ray", "start", f"--address={HEAD}:6379", *common]
        bench.machines[name].must(join, SECONDS, **_environment(name))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1.0)


def _line(output: str, *words: str) -> str:
    """The first line of the output with all of these words."""
    found = (line for line in output.splitlines() if all(word in line for word in words))
    return next(found, "")


def _remote_contents(bench: Bench, prefix: str) -> dict[str, bytes]:
    target = bench.directory / "downloaded" / prefix
    copy = "import fsspec, sys; fsspec.filesystem('s3').get(sys.argv[1], sys.argv[2], recursive=True)"
    words = [sys.executable, "-c", copy, f"{BUCKET}/{prefix}/", f"{target}/"]
    bench.head.must(words, SECONDS, **_environment(HEAD))
    return contents(target)


def _same(bench: Bench, found: dict[str, bytes]) -> bool:
    """Whether the files equal those of the undisturbed store. Only the recipe, left out here, has paths."""
    return found == bench.reference


# --- the faults ---


def other_python(bench: Bench) -> list[Row]:
    """A node with another patch version of Python joins; Ray refuses it and prints both versions."""
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    words = [OTHER_PYTHON, "-m", "ray.scripts.scripts", "start", f"--address={HEAD}:6379", "--num-cpus=1"]
    environment = _environment(WELL) | {"PYTHONPATH": f"{packages}:{ROOT}"}
    code, output = bench.machines[WELL].run(words, SECONDS, **environment)
    print(output, flush=True)
    refused = code != 0 and "Version mismatch" in output
    versions = " / ".join(re.findall(r"Python: (\S+)", output))
    return [["Python of another version joins", f"ray start: Version mismatch, {versions}", refused]]


def poisoned(bench: Bench) -> list[Row]:
    """The embedding of one word is NaN, and one line of the text has that word."""
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
    """The sick node's disk for temporary files holds one page; the store is in the object store."""
    bench.sick.must(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", SCRATCH])
    made = bench.begin("full", f"store.path=s3://{BUCKET}/full")
    code, output = made.end()
    bench.sick.must(["umount", "-l", SCRATCH])
    line = _line(output, SICK, "disk is full")
    holds = code == 0 and bool(line) and _same(bench, _remote_contents(bench, "full"))
    return [
        ["the disk of a node is full", f"exit {code}, same store; {line}", holds and made.logged("Traceback")]
    ]


def object_store_503(bench: Bench) -> list[Row]:
    """From the first task on, the object store answers the sick node 503 for a minute."""
    made = bench.begin("refused", f"store.path=s3://{BUCKET}/refused")
    _until(lambda: "tasks" in made.log.read_text() or made.process.poll() is not None)
    flag = Path(_flag(bench, "503"))
    flag.touch()
    ended = time.monotonic() + 60.0
    _until(lambda: time.monotonic() > ended)
    flag.unlink()
    code, output = made.end()
    line = _line(output, SICK, "503")
    holds = code == 0 and _same(bench, _remote_contents(bench, "refused"))
    return [
        [
            "the object store answers one node 503 for a minute",
            f"exit {code}, same store; {line}",
            holds and bool(line),
        ]
    ]


def hub_refuses(bench: Bench) -> list[Row]:
    Path(_flag(bench, "429")).touch()
    made = bench.begin("hub", f"teacher.model={MODEL}")
    code, output = made.end()
    line = _line(output, SICK, MODEL)
    holds = code == 0 and bool(line) and contents(made.store) == bench.reference
    return [["the hub refuses one worker (429)", f"exit {code}, same store; {line}", holds]]


def hung(bench: Bench) -> list[Row]:
    """The sick node's worker gets SIGSTOP after ten tasks, from whose durations deadlines are known."""
    made = bench.begin("hung")
    made.until_tasks(10)
    bench.sick.must(["pkill", "--signal", "STOP", "--full", "ray::TaskWorker"])
    before, stopped = len(indices(made.store)), time.monotonic()
    code, output = made.end()
    line = _line(output, SICK, "no answer in time")
    holds = code == 0 and bool(line) and contents(made.store) == bench.reference
    after = f"{time.monotonic() - stopped:.0f} s after it, with {before} tasks done before"
    return [["a worker hangs (SIGSTOP)", f"exit {code} {after}, same store; {line}", holds]]


def node_lost(bench: Bench) -> list[Row]:
    made = bench.begin("lost")
    made.until_tasks(10)
    before = len(indices(made.store))
    bench.sick.lose()
    code, output = made.end()
    line = _line(output, "the worker died")
    holds = code == 0 and contents(made.store) == bench.reference
    return [["a node is lost", f"exit {code}, same store, {before} tasks before it; {line}", holds]]


def head_lost(bench: Bench) -> list[Row]:
    """Ray's head dies while the driver is on another machine. The command is repeated with a new head."""
    made = bench.begin("headless", on=WELL)
    made.until_tasks(10)
    bench.head.run(["pkill", "--signal", "KILL", "--full", "raylet|gcs_server"])
    code, output = made.end()
    last = (output.strip().splitlines() or [""])[-1]
    kept = {path: path.stat().st_mtime_ns for path in indices(made.store)}
    bench.machines[WELL].run(["ray", "stop", "--force"], SECONDS)
    bench.head.run(["ray", "stop", "--force"], SECONDS)
    head = ["ray", "start", "--head", "--port=6379", "--num-cpus=2", "--disable-usage-stats"]
    bench.head.must([*head, "--include-dashboard=false"], SECONDS, **_environment(HEAD))
    again = bench.begin("headless")
    second, _ = again.end()
    same = {path: path.stat().st_mtime_ns for path in kept} == kept
    holds = code not in (0, None) and second == 0 and same and contents(made.store) == bench.reference
    seen = f"exit {code}: {last}; the same command: exit {second}, {len(kept)} tasks kept, same store"
    return [["the head is lost", seen, holds]]


ROWS = (other_python, poisoned, disk_full, object_store_503, hub_refuses, hung, node_lost, head_lost)

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command(main)
