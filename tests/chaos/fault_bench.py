"""The cluster of `tests.chaos.faults`: three machines with a Ray cluster, an object store and two hubs.

node-0 runs Ray's head, an S3 server and the driver; node-1 and node-2 have one worker each. node-2 has its
own proxy to the object store and its own hub, which fail on demand.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.hosts import Machine, Machines
from tests.conftest import ROOT
from tests.offline_teacher.local_pool import make
from tests.offline_teacher.stores import contents, indices, wait_until
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text

HEAD, WELL, SICK = "node-0", "node-1", "node-2"
LINES = 4000
SECONDS = 900.0
S3_PORT, HUB_PORT, REFUSING_PORT, PROXY_PORT = 5555, 8000, 8001, 5556
BUCKET = "faults"
HUB_CACHE = str(Path(tempfile.gettempdir(), "hub"))
SCRATCH = str(Path(tempfile.gettempdir(), "scratch"))
"""Directory for temporary files; `disk_full` mounts a separate disk there."""
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
PATIENT = {
    "RAY_health_check_period_ms": "5000",
    "RAY_health_check_timeout_ms": "20000",
    "RAY_health_check_failure_threshold": "4",
}
"""Longer timeouts, because on a busy machine Ray would take a node for dead that only waits for a CPU."""


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

    def flag(self, name: str) -> Path:
        """Returns the path of a file; while it exists, the sick node's service answers with status
        ``name``."""
        return self.directory / name

    def remote(self, prefix: str) -> dict[str, bytes]:
        """Returns file -> content of a store in the bucket."""
        target = self.directory / "downloaded" / prefix
        copy = "import fsspec, sys; fsspec.filesystem('s3').get(sys.argv[1], sys.argv[2], recursive=True)"
        words = [sys.executable, "-c", copy, f"{BUCKET}/{prefix}/", f"{target}/"]
        self.head.must(words, SECONDS, **environment_of(HEAD))
        return contents(target)

    def until_sick_works(self, made: Pass) -> None:
        """Waits until the sick node's worker has a task; its process then has the method's name as its
        title."""
        until(
            lambda: (
                made.process.poll() is not None
                or self.sick.run(["pgrep", "--runstates", "R,S,D", "--full", "ray::infer"])[0] == 0
            )
        )
        assert made.process.poll() is None, made.log.read_text()

    def begin(self, name: str, *overrides: str, on: str = HEAD) -> Pass:
        """Starts a pass of the recipe on the cluster; its output is ``name`` unless overridden."""
        output = self.directory / name
        log = self.directory / f"{name}.log"
        words = ["python", "-m", "offline_teacher.main", "run", "--recipe", str(self.recipe)]
        words += [f"output={output}", "teacher.workers=2", f"teacher.ray_address={HEAD}:6379", *overrides]
        process = self.machines[on].start(words, log, **environment_of(on))
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
        """Waits until the pass ends, and returns its exit code and output."""
        code = self.process.wait(SECONDS)
        print(f"{self.log.stem}: exit {code}\n{self.log.read_text()}", flush=True)
        return code, self.log.read_text()

    def until_tasks(self, count: int) -> None:
        wait_until(lambda: len(indices(self.store)) >= count, self.process)

    def logged(self, *words: str) -> bool:
        """Whether one of the pass's log files has all of these words."""
        logs = [path.read_text() for path in (self.output / "tiny/logs").glob("*.log")]
        return any(all(word in text for word in words) for text in logs)


@contextmanager
def opened() -> Iterator[Bench]:
    """Starts the machines, the services and Ray, and makes the reference store."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "machines")
        with Machines([HEAD, WELL, SICK], directory) as machines:
            text = write_text(directory / "text.txt", LINES)
            recipe = write_recipe(directory, text, save_bert(directory / "model"), masking={"epochs": 2})
            make(recipe)  # by one process, without Ray
            bench = Bench(machines, directory, recipe, contents(directory / "runs/tiny/store"))
            _services(bench)
            _cluster(bench)
            yield bench


def environment_of(name: str) -> dict[str, str]:
    """Returns the environment variables of Ray and of drivers on a machine."""
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
    bench.head.start([*hub, str(REFUSING_PORT), str(bench.directory / "model"), str(bench.flag("429"))], log)
    proxy = [python, "-m", "tests.chaos.services", "proxy", str(PROXY_PORT), f"http://{HEAD}:{S3_PORT}"]
    bench.sick.start([*proxy, str(bench.flag("503"))], log)
    for name in (HEAD, WELL, SICK):
        bench.machines[name].must(["mkdir", "-p", SCRATCH])
    make = f"import boto3; boto3.client('s3').create_bucket(Bucket='{BUCKET}')"
    until(lambda: bench.head.run([python, "-c", make], **environment_of(HEAD))[0] == 0)


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
    bench.head.must(words, SECONDS, **environment_of(HEAD))
    for name in (WELL, SICK):
        join = ["ray", "start", f"--address={HEAD}:6379", *common]
        bench.machines[name].must(join, SECONDS, **environment_of(name))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
