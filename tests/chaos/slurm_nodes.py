"""``python -m tests.chaos.slurm_nodes``: runs the Slurm scripts on a Slurm of two machines. Needs root.

The machines are network namespaces (`tests.chaos.hosts`) with slurmctld, slurmd and munged of Debian's
packages. Each claims to have a GPU, of which scripts and trainer use only the number.

1. ``student.sbatch`` gets the signal that Slurm sends before the time limit. The ranks must save a
   checkpoint, and the job must be requeued, resume and end. Every step must have the samples of one
   undisturbed process.
2. ``teacher.sbatch`` must make the store of a single process, byte for byte, and remove the job's token.

Prints a table; exits 1 if a row does not hold. About 5 minutes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from infra.console import command, table
from infra.errors import UserError
from tests.chaos.arguments import described
from tests.chaos.hosts import Machine, Machines
from tests.chaos.student import history
from tests.offline_teacher.stores import contents, finish, start
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text
from tests.student_train.tiny_run import make_run

NODES = ("node-0", "node-1")
SIZE = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1"]
SECONDS = 400.0
CONFIG = """
ClusterName=test
SlurmctldHost=node-0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={slurm}/state
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={slurm}/slurmctld.log
SlurmdLogFile={slurm}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
GresTypes=gpu
JobRequeue=1
NodeName=node-[0-1] CPUs={cpus} RealMemory=1000 Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_MUNGE = """
mkdir -p /run/munge /tmp/munge /tmp/slurmd
cp "$1" /tmp/munge/key && chmod 400 /tmp/munge/key && chmod 700 /tmp/munge
munged --force --key-file /tmp/munge/key --log-file /tmp/munge/log --seed-file /tmp/munge/seed \
  --pid-file /tmp/munge/pid
mount --bind "$2" ~/.ray  # home directories are shared where Slurm is
"""

Row = list[object]


def main() -> int:
    described(__doc__).parse_args()
    missing = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(tool) is None]
    if missing:
        raise UserError(f"no {', '.join(missing)} here; apt-get install slurmctld slurmd slurm-client munge")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "machines")
        with Machines(NODES, directory) as machines:
            environment = _boot(machines, directory / "slurm")
            head = machines[NODES[0]]
            rows = [*student(head, directory / "student", environment)]
            rows += teacher(head, directory / "teacher", environment)
    print(table(rows, ["what", "figure", "holds"]))
    return 0 if all(row[-1] for row in rows) else 1


def _boot(machines: Machines, slurm: Path) -> dict[str, str]:
    """Starts Slurm, and returns the environment variables with which commands find it."""
    for folder in (slurm / "state", slurm / "ray"):
        folder.mkdir(parents=True)
    (slurm / "slurm.conf").write_text(CONFIG.format(slurm=slurm, cpus=os.cpu_count()))
    (slurm / "gres.conf").write_text("NodeName=node-[0-1] Name=gpu File=/dev/zero\n")
    (slurm / "cgroup.conf").write_text("CgroupAutomount=no\n")
    key = slurm / "munge.key"
    key.write_bytes(os.urandom(128))
    environment = {"SLURM_CONF": str(slurm / "slurm.conf")}
    for name in NODES:
        machines[name].must(["bash", "-euc", _MUNGE, "munge", key, slurm / "ray"])
    machines[NODES[0]].must(["slurmctld", "-c"], **environment)
    for name in NODES:
        machines[name].must(["slurmd", "-N", name], **environment)
    ready = ["sinfo", "--noheader", "--format=%D %t"]
    _until(lambda: machines[NODES[0]].run(ready, **environment)[1].strip() == "2 idle")
    return environment


def student(head: Machine, directory: Path, environment: dict[str, str]) -> list[Row]:
    train = {"epochs": 60, "batch_size": 12, "micro_batch_size": 2, "checkpoint_every": 1000}
    recipe = make_run(directory, sequences=64, masking_epochs=2, held_out=0, recipe={"train": train})
    shutil.copytree(directory / "runs/tiny", directory / "runs/alone")
    head.must([sys.executable, "student_train/main.py", "--recipe", recipe, "name=alone"], SECONDS)
    alone, run, log = history(directory / "runs/alone"), directory / "runs/tiny", directory / "job.log"
    job = _submit(head, "student", log, environment, str(recipe))
    _until(lambda: len(history(run)) > 10)
    head.must(["scancel", "--signal=TERM", "--batch", job], **environment)
    _until(lambda: "Restarts=1" in _job(head, job, environment))
    saved, interrupted = len(history(run)), "the same command continues" in log.read_text()
    head.must(["scontrol", "update", f"JobId={job}", "StartTime=now"], **environment)
    _until(lambda: "JobState=COMPLETED" in _job(head, job, environment))
    print(log.read_text()[-2500:], flush=True)
    samples = [(line["step"], line["samples"]) for line in history(run)]
    same = samples == [(line["step"], line["samples"]) for line in alone]
    return [
        ["student, signalled: steps done, a checkpoint saved", f"{saved} of {len(alone)}", interrupted],
        ["student, requeued: steps with the samples of one process", len(samples), same],
    ]


def teacher(head: Machine, directory: Path, environment: dict[str, str]) -> list[Row]:
    directory.mkdir()
    text = write_text(directory / "text.txt", 800)
    recipe = write_recipe(directory, text, save_bert(directory / "model"), masking={"epochs": 2})
    code, output = finish(start(recipe))
    assert code == 0, output
    reference = contents(directory / "runs/tiny/store")
    log, output_directory = directory / "job.log", directory / "slurm"
    overrides = [f"output={output_directory}", "teacher.gpus_per_worker=0"]
    job = _submit(head, "teacher", log, environment, str(recipe), *overrides)
    _until(lambda: "JobState=COMPLETED" in _job(head, job, environment))
    print(log.read_text()[-2500:], flush=True)
    tokens = list((head.own.parent / "slurm/ray").iterdir())
    return [
        ["teacher: store identical", "", contents(output_directory / "tiny/store") == reference],
        ["teacher: tokens left behind", len(tokens), not tokens],
    ]


def _submit(head: Machine, script: str, log: Path, environment: dict[str, str], *arguments: str) -> str:
    words = ["sbatch", "--parsable", *SIZE, f"--output={log}", f"infra/deploy/slurm/{script}.sbatch"]
    return head.must([*words, *arguments], **environment).strip()


def _job(head: Machine, job: str, environment: dict[str, str]) -> str:
    state = head.must(["scontrol", "show", "job", job], **environment)
    assert "JobState=FAILED" not in state, state
    return state


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


if __name__ == "__main__":
    command(main)
