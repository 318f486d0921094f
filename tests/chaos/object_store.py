"""Runs all three stages on an S3 server with faults, and compares the results with those on a local disk.

    python -m tests.chaos.object_store [--share 0.05] [--seed 0] [--directory DIR]

A proxy before the server answers ``--share`` of all requests with a fault: a server error, throttling, a
reset connection, a reset in the middle of an upload, half an answer, a wrong bit, or no answer. Files that
are read without a digest get no wrong bits, because only TLS, which is not used here, protects them. They are
texts, labelled tasks, evaluated models, and the teacher's files while its store is made.

1. The teacher pass has corpus and store on s3:// and two workers; its driver is killed once. Every file of
   both stores must equal that of a pass on the local disk, and ``verify`` must find nothing.
2. The student has store, checkpoints and model on s3://, two ranks, and a local cache. It is killed once
   after a checkpoint and resumed on a machine without cache. Samples, losses and weights must be equal.
3. The evaluation has model, task files and scores on s3://. The scores must be equal.
4. Files are uploaded in parts, one of which fails. The same bytes must arrive, and no unfinished upload,
   which would cost money, may remain.

Prints a table; exits 1 if a row does not hold. Takes about ten minutes, since a request without an answer is
repeated only after half a minute.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import tests.conftest  # noqa: F401 - the machine's settings, for the commands started here too
from infra.console import table
from infra.files import storage
from tests.chaos.__main__ import OVERLOADED
from tests.chaos.arguments import described
from tests.conftest import ROOT
from tests.s3_server import FAULTS, Chooser, FaultyProxy, s3_server
from tests.tiny_project import (
    TASK,
    evaluation_command,
    make_project,
    run,
    student_command,
    teacher_command,
)

BUCKET = "chaos"
REMOTE = f"s3://{BUCKET}"
MIX = tuple(fault for fault in FAULTS if fault != "hang") * 4 + ("hang",)
"""Faults, drawn with equal probability. A hang costs half a minute, so it is rarer than the others."""
WITHOUT_DIGEST = ("/corpus/", "/glue/", "/tokenizer/", "/teacher/", "/model/", "/evaluation/")
"""Parts of the paths of files that are read without a digest."""
PART_BYTES = 50 << 20
"""Bytes of one part of a multipart upload by s3fs."""
SECONDS = 900.0

Files = dict[str, bytes]
Row = list[object]


class Bench:
    """The server, its proxy and the rows of the table."""

    def __init__(self, proxy: FaultyProxy, client: Any, share: float, seed: int) -> None:
        self.proxy, self.client, self.share, self.seed = proxy, client, share, seed
        self.rows: list[Row] = []
        self.total: collections.Counter[str] = collections.Counter()
        self._rng = random.Random(seed)
        self._begin = time.monotonic()

    def faults_on(self) -> None:
        self.proxy.seen.clear()
        self.proxy.often(self.share, self._rng.randrange(1 << 30), MIX)
        self.proxy.choose = _but_for_texts(self.proxy.choose)
        self._begin = time.monotonic()

    def row(self, what: str, holds: bool, note: str = "") -> None:
        """Adds and prints a row with the number of faults since ``faults_on``."""
        counts = collections.Counter(fault or "none" for _, _, fault in self.proxy.seen)
        self.total.update(counts)
        seconds = f"{time.monotonic() - self._begin:.0f}"
        self.rows.append([what, *_figures(counts), seconds, note, holds])
        print(table([self.rows[-1]], HEADERS), flush=True)

    def files(self, prefix: str) -> Files:
        """Returns name -> content of all files below ``prefix``, read from the server without the proxy."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        names = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {
            name.removeprefix(f"{prefix}/"): self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
            for name in names
        }

    def upload(self, source: Path, prefix: str) -> None:
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_file():
                name = path.name if source.is_file() else f"{source.name}/{path.relative_to(source)}"
                self.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=path.read_bytes())


HEADERS = ["what", "requests", *FAULTS, "faults", "seconds", "compared", "holds"]


def _but_for_texts(choose: Chooser) -> Chooser:
    """Returns a function that chooses the same faults, but no wrong bits in files without a digest."""

    def chosen(method: str, path: str) -> str | None:
        fault = choose(method, path)
        return None if fault == "wrong" and any(name in path for name in WITHOUT_DIGEST) else fault

    return chosen


def _figures(counts: collections.Counter[str]) -> list[object]:
    kinds = [counts[fault] for fault in FAULTS]
    return [sum(counts.values()), *kinds, sum(kinds)]


def main() -> int:
    parser = described(__doc__)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory",
        type=Path,
        help="directory of the local runs, kept for the next call; default: temporary",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, s3_server() as server, FaultyProxy(server) as proxy:
        import boto3

        os.environ |= {
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        client = boto3.client("s3", endpoint_url=server)
        client.create_bucket(Bucket=BUCKET)
        bench = Bench(proxy, client, options.share, options.seed)
        directory = options.directory or Path(temporary)
        recipe = reference(directory)
        local = directory / "runs" / "tiny"
        bench.upload(directory / "train.txt", "corpus")
        bench.upload(directory / "validation.txt", "corpus")
        bench.upload(directory / "glue" / TASK, "glue")
        overrides = (
            f"output={REMOTE}/runs",
            f"corpus.path={REMOTE}/corpus/train.txt",
            f"corpus.validation_path={REMOTE}/corpus/validation.txt",
            f"evaluation.data={REMOTE}/glue",
        )
        teacher(bench, recipe, overrides, local)
        student(bench, recipe, overrides, local)
        evaluation(bench, recipe, overrides, local)
        parts(bench, directory)
    print()
    print(table([*bench.rows, ["all", *_figures(bench.total), "", "", ""]], HEADERS))
    return 0 if all(row[-1] for row in bench.rows) else 1


def reference(directory: Path) -> Path:
    """Runs all three stages on the local disk without faults, and returns the path of the recipe."""
    recipe = directory / "recipe.yaml"
    if not recipe.exists():
        make_project(directory, store={"top_k": 4, "task_sequences": 32}, tracking={"enabled": False})
    for command in (teacher_command(recipe), student_command(recipe), evaluation_command(recipe)):
        ended = run(command)
        while OVERLOADED in ended.stdout + ended.stderr:
            ended = run(command)
        if ended.returncode != 0:
            raise SystemExit(f"without faults: {ended.stdout}{ended.stderr}")
    return recipe


def teacher(bench: Bench, recipe: Path, overrides: tuple[str, ...], local: Path) -> None:
    command = teacher_command(recipe, *overrides)
    bench.faults_on()
    killed(command, lambda: published(bench, "/store/tasks/", ".json") >= 5, alone=True)
    finished(command)
    same, said = _compared(_store(bench.files("runs/tiny/store")), _local(local / "store"))
    bench.row("teacher pass, driver killed once", same, said)
    bench.faults_on()
    ended = run([sys.executable, "-m", "offline_teacher.main", "verify", f"{REMOTE}/runs/tiny/store"])
    bench.row("verify", ended.returncode == 0, ended.stdout.strip().splitlines()[-1] if ended.stdout else "")


def student(bench: Bench, recipe: Path, overrides: tuple[str, ...], local: Path) -> None:
    bench.faults_on()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        once, again = (
            student_command(recipe, *overrides, f"train.cache_dir={machine}") for machine in (first, second)
        )
        killed(once, lambda: published(bench, "/student/files.json", "") >= 2, alone=False)
        finished(again)
    remote, there = bench.files("runs/tiny/students/student"), _local(local / "students/student")
    compared = ("step", "samples", "loss", "kl", "mlm", "cosine", "gradient_norm", "learning_rate")
    logs = [
        [[json.loads(line).get(name) for name in compared] for line in files["history.jsonl"].splitlines()]
        for files in (remote, there)
    ]
    same_order = logs[0] == logs[1] and len(logs[0]) > 10
    same_model = remote["model/model.safetensors"] == there["model/model.safetensors"]
    note = f"{len(logs[0])} log lines, weights {'identical' if same_model else 'DIFFER'}"
    bench.row("student, killed once, other machine", same_order and same_model, note)


def evaluation(bench: Bench, recipe: Path, overrides: tuple[str, ...], local: Path) -> None:
    bench.faults_on()
    finished(evaluation_command(recipe, *overrides))
    reports = [
        json.loads(bench.files("runs/tiny/evaluation")["report.json"])["rows"],
        json.loads((local / "evaluation" / "report.json").read_text())["rows"],
    ]
    scores = [{name: row["scores"] for name, row in rows.items()} for rows in reports]
    bench.row("evaluation", scores[0] == scores[1], f"{len(scores[0])} rows of scores")


def parts(bench: Bench, directory: Path) -> None:
    """Uploads files in parts; besides random faults, the first attempt of one request always fails."""
    path = directory / "large.bin"
    data = random.Random(bench.seed).randbytes(PART_BYTES * 5 // 2)
    path.write_bytes(data)
    died = [(fault, "PUT", "partNumber=2", "a part meets") for fault in ("torn", "reset", "500", "503")]
    for fault, method, words, what in [*died, ("cut", "POST", "uploadId=", "the end is answered by")]:
        bench.faults_on()
        left = bench.proxy.once(fault, method=method, words=words)
        with storage.publishing(f"{REMOTE}/large/{fault}.bin") as draft:
            os.link(path, f"{draft}.link")
            os.replace(f"{draft}.link", draft)
        unfinished = bench.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        body = bench.client.get_object(Bucket=BUCKET, Key=f"large/{fault}.bin")["Body"].read()
        holds = body == data and not unfinished and not left
        bench.row(f"125 MiB in parts, {what} {fault}", holds, f"{len(unfinished)} unfinished uploads left")


# --- commands ---------------------------------------------------------------------------------------------


def killed(command: list[str], condition: Callable[[], bool], alone: bool) -> None:
    """Starts a command, and kills it as soon as the condition holds; unless ``alone``, also its children."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        deadline = time.monotonic() + SECONDS
        while not condition():
            if process.poll() is not None or time.monotonic() > deadline:
                assert process.stdout is not None
                raise SystemExit("it ended before it could be killed:\n" + process.stdout.read().decode())
            time.sleep(0.01)  # between two checks of the condition
        children = [] if alone else psutil.Process(process.pid).children(recursive=True)
        for member in [process, *children]:
            try:
                os.kill(member.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def finished(command: list[str]) -> None:
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    while OVERLOADED in ended.stdout + ended.stderr:
        ended = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    if ended.returncode != 0:
        raise SystemExit(f"exit code {ended.returncode}:\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")


def published(bench: Bench, folder: str, ending: str) -> int:
    """Returns the number of successful uploads of files with such names."""
    return sum(
        method == "PUT" and fault is None and folder in path and path.partition("?")[0].endswith(ending)
        for method, path, fault in list(bench.proxy.seen)
    )


# --- comparing --------------------------------------------------------------------------------------------


def _store(files: Files) -> Files:
    """Returns the files without the recipe, which has paths and speed settings, and without the lock file."""
    left_out = ("recipe.yaml", storage.LOCK)
    return {name: data for name, data in files.items() if name not in left_out}


def _local(directory: Path) -> Files:
    files = {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    return _store(files)


def _compared(remote: Files, local: Files) -> tuple[bool, str]:
    names = remote.keys() | local.keys()
    other = sorted(name for name in names if remote.get(name) != local.get(name))
    return not other, f"{len(names)} files, {len(other)} differ {' '.join(other[:5])}".strip()


if __name__ == "__main__":
    sys.exit(main())
