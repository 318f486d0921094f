"""``python -m tests.chaos.ray_nodes``: runs the documented Ray commands on a cluster. Needs root.

Four machines in network namespaces (`tests.chaos.hosts`): a laptop, a head, two workers.

1. ``ray up`` with ``infra/deploy/ray/on_premise.yaml``, in which these hosts are written. A link to this
   environment replaces the installation, because the hosts reach no package registry.
2. ``ray submit``: the store must equal that of a single process, byte for byte.
3. ``ray job submit`` through ``ray dashboard``: refused without a token and with a wrong token. A job is
   stopped half-way and submitted again; its logs and its uploaded files are checked.
4. All processes of the head except sshd are killed half-way through a job; then ``ray up`` and the job again.
5. A pass runs on all hosts, one of which loses its network and all its processes half-way.
6. ``ray down`` and ``ray stop``, without that host.

Prints a table; exits 1 if a row does not hold. About 15 minutes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from infra.console import command, table
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.unfinished import finished_parts, read_parts, read_spec
from tests.chaos.arguments import described
from tests.chaos.hosts import Machine, Machines
from tests.conftest import ROOT
from tests.offline_teacher.stores import contents, finish, indices, start, wait_until
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text

LAPTOP, HEAD, WORKERS = "laptop", "node-0", ("node-1", "node-2")
LINES = 3_200
MINUTES = 600.0
TOKEN_MODE = {"RAY_AUTH_MODE": "token"}
API = {**TOKEN_MODE, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}
RUNTIME_ENV = "infra/deploy/ray/runtime_env.yaml"

Row = list[object]
Bytes = dict[str, bytes]


def main() -> int:
    described(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "machines")
        with Machines([LAPTOP, HEAD, *WORKERS], directory) as machines:
            text = write_text(directory / "text.txt", LINES)
            recipe = write_recipe(directory, text, save_bert(directory / "model"), masking={"epochs": 2})
            code, output = finish(start(recipe))
            assert code == 0, output
            reference = contents(directory / "runs/tiny/store")
            cluster = _cluster_file(directory, machines)
            rows = [
                up(machines[LAPTOP], cluster),
                submit(machines[LAPTOP], cluster, recipe, reference),
                *jobs(machines[LAPTOP], cluster, recipe, reference),
                uploaded(machines[HEAD]),
                *head_killed(machines, cluster, recipe, reference),
                *node_lost(machines, recipe, reference),
                down(machines, cluster),
                token_kept(machines),
            ]
    print(table(rows, ["what", "figure", "holds"]))
    return 0 if all(row[-1] for row in rows) else 1


def _cluster_file(directory: Path, machines: Machines) -> Path:
    """Writes ``on_premise.yaml`` with our hosts and without commands that need a package registry."""
    cluster = yaml.safe_load((ROOT / "infra/deploy/ray/on_premise.yaml").read_text())
    cluster["provider"] |= {
        "head_ip": machines[HEAD].address,
        "worker_ips": [machines[name].address for name in WORKERS],
    }
    cluster["min_workers"] = cluster["max_workers"] = len(WORKERS)
    cluster["auth"]["ssh_user"] = "root"
    setup = [line for line in cluster["setup_commands"] if "install.sh" not in line]
    cluster["setup_commands"] = [f"ln -sfn {sys.prefix} ~/venv", *setup]
    path = directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return path


def up(laptop: Machine, cluster: Path) -> Row:
    """Makes the token and starts the cluster, with the commands at the top of the cluster file."""
    laptop.must(["ray", "get-auth-token", "--generate"])
    laptop.must(["chmod", "600", Path.home() / ".ray/auth_token"])
    _up(laptop, cluster)
    return ["ray up: nodes that joined", 1 + len(WORKERS), True]


def _up(laptop: Machine, cluster: Path) -> None:
    start_time = time.monotonic()
    laptop.must(["ray", "up", "--yes", "--log-color", "false", cluster], MINUTES)
    expected = f"{1 + len(WORKERS)} local.cluster.node"
    _until(lambda: expected in laptop.run(["ray", "exec", cluster, "ray status"], MINUTES)[1])
    _say(f"{expected} after {time.monotonic() - start_time:.0f} s")


def submit(laptop: Machine, cluster: Path, recipe: Path, reference: Bytes) -> Row:
    """Submits main.py as a script, which Ray copies to the head's home directory without other files."""
    output = recipe.parent / "submitted"
    _say(
        laptop.must(
            [
                "ray",
                "submit",
                cluster,
                "offline_teacher/main.py",
                "run",
                "--recipe",
                recipe,
                f"output={output}",
                "teacher.workers=3",
            ],
            MINUTES,
        )
    )
    return ["ray submit: store identical", "", contents(output / "tiny/store") == reference]


def jobs(laptop: Machine, cluster: Path, recipe: Path, reference: Bytes) -> list[Row]:
    laptop.start(["ray", "dashboard", cluster], laptop.own / "dashboard.log", **TOKEN_MODE)
    _until(lambda: laptop.run(["ray", "job", "list"], MINUTES, **API)[0] == 0)
    rows = [*_refused(laptop)]
    output = recipe.parent / "jobs"
    store = output / "tiny/store"

    log = laptop.own / "pass-1.log"
    following = laptop.start(_job("pass-1", recipe, output), log, **API)
    wait_until(lambda: len(indices(store)) > 5, following)
    stopped = laptop.must(["ray", "job", "stop", "pass-1"], MINUTES, **API)
    following.wait(MINUTES)
    kept = {path: path.stat().st_mtime_ns for path in indices(store)}
    tasks = _tasks(store)
    _say(log.read_text())
    halfway = "was stopped" in stopped and not (store / "manifest.json").exists()
    rows += [
        ["ray job stop: tasks kept", f"{len(kept)} of {tasks}", halfway],
        [
            "its log: progress, and the farewell of a stopped pass",
            "",
            _log_holds(log, "teacher, train:", "continues"),
        ],
    ]
    _say(laptop.must(_job("pass-2", recipe, output), MINUTES, **API))
    same = {path: path.stat().st_mtime_ns for path in kept} == kept
    rows += [
        ["submitted again: tasks made again that were kept", 0, same],
        ["submitted again: store identical", "", contents(store) == reference],
    ]
    return rows


def _job(name: str, recipe: Path, output: Path) -> list[str]:
    words = ["ray", "job", "submit", "--submission-id", name, "--working-dir", ".", "--runtime-env"]
    words += [RUNTIME_ENV, "--", "python", "-m", "offline_teacher.main", "run", "--recipe", str(recipe)]
    return [*words, f"output={output}", "teacher.workers=2"]


def _refused(laptop: Machine) -> list[Row]:
    """Calls the jobs API and the cluster's port without a token and with a wrong token."""
    wrong = {"RAY_AUTH_TOKEN": "0" * 64}
    gcs = ["ray", "status", "--address", "node-0:6379"]
    tries = {
        "ray job list without a token": (["ray", "job", "list"], {**API, "RAY_AUTH_MODE": "disabled"}),
        "ray job list with another token": (["ray", "job", "list"], {**API, **wrong}),
        "ray status without a token": (gcs, {"RAY_AUTH_MODE": "disabled"}),
        "ray status with another token": (gcs, {**TOKEN_MODE, **wrong}),
    }
    rows: list[Row] = []
    for name, (words, environment) in tries.items():
        code, output = laptop.run(words, MINUTES, **environment)
        reason = next((line for line in output.splitlines() if "exceptions.AuthenticationError" in line), "")
        _say(f"{name}: {reason}")
        rows.append([f"{name}: refused", "", code != 0 and bool(reason)])
    return rows


def uploaded(head: Machine) -> Row:
    """Checks that ``--working-dir .`` uploads the sources, but no environment, outputs or caches."""
    packages = list((head.own / "tmp/ray").glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))
    unwanted = {".git", ".venv", "runs", "tests", ".mypy_cache", ".pytest_cache", ".hypothesis"}
    clean, size = bool(packages), 0
    for package in packages:  # two if the working tree was changed between the two submissions
        names = {path.name for path in package.iterdir()}
        clean &= {"offline_teacher", "infra"} <= names and not names & unwanted
        size = max(size, sum(path.stat().st_size for path in package.rglob("*") if path.is_file()))
    return ["working directory uploaded without environment, outputs and caches", f"{size >> 10} KB", clean]


def head_killed(machines: Machines, cluster: Path, recipe: Path, reference: Bytes) -> list[Row]:
    """Kills the head's Ray and the job's driver at once, while the workers' machines keep running."""
    laptop, head, output = machines[LAPTOP], machines[HEAD], recipe.parent / "headless"
    store, log = output / "tiny/store", laptop.own / "pass-3.log"
    following = laptop.start(_job("pass-3", recipe, output), log, **API)
    wait_until(lambda: len(indices(store)) > 20, following)
    head.run(["pkill", "--signal", "KILL", "--full", "python|raylet|gcs_server"])
    _until(lambda: _ray_processes(head) == 0)
    following.wait(MINUTES)
    halfway = not (store / "manifest.json").exists()
    _until(lambda: all(_teachers(machines[name]) == 0 for name in WORKERS))
    kept = {path: path.stat().st_mtime_ns for path in indices(store)}
    _up(laptop, cluster)
    _until(lambda: laptop.run(["ray", "job", "list"], MINUTES, **API)[0] == 0)
    _say(laptop.must(_job("pass-4", recipe, output), MINUTES, **API))
    same = {path: path.stat().st_mtime_ns for path in kept} == kept
    return [
        ["head killed: tasks kept", f"{len(kept)} of {_tasks(store)}", halfway],
        ["ray up and the job again: tasks made again that were kept", 0, same],
        ["ray up and the job again: store identical", "", contents(store) == reference],
    ]


def down(machines: Machines, cluster: Path) -> Row:
    """Stops Ray on the head with ``ray down``, and on another host with ``ray stop``, as the README says.
    ``ray down`` stops only the head if, as here, it cannot terminate the hosts."""
    start_time, address = time.monotonic(), machines[WORKERS[0]].address
    machines[LAPTOP].must(["ray", "down", "--yes", cluster], MINUTES)
    seconds = time.monotonic() - start_time
    _say(f"ray down: {seconds:.0f} s; {_ray_processes(machines[HEAD])} processes of Ray left on the head")
    ssh = ["ssh", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    machines[LAPTOP].must([*ssh, f"root@{address}", "~/venv/bin/ray stop"], MINUTES)
    left = {name: _ray_processes(machines[name]) for name in (HEAD, WORKERS[0])}
    return ["ray down, ray stop: processes of Ray left", sum(left.values()), not any(left.values())]


def _ray_processes(machine: Machine) -> int:
    _, output = machine.run(["pgrep", "--count", "--full", "raylet|gcs_server|ray::|dashboard.py"])
    return int(output)


def node_lost(machines: Machines, recipe: Path, reference: Bytes) -> list[Row]:
    """Runs a pass with more workers than fit on one host, and loses a host after the first tasks."""
    lost, output = machines[WORKERS[-1]], recipe.parent / "lost"
    store, log = output / "tiny/store", machines[HEAD].own / "lost.log"
    process = machines[HEAD].start(
        [
            "python",
            "-m",
            "offline_teacher.main",
            "run",
            "--recipe",
            recipe,
            f"output={output}",
            "teacher.workers=6",
            "teacher.ray_address=auto",
        ],
        log,
        **TOKEN_MODE,
    )
    wait_until(lambda: len(indices(store)) > 20 and _teachers(lost) > 0, process)
    at_work, before = _teachers(lost), len(indices(store))
    lost.lose()
    code = process.wait(MINUTES)
    _say(log.read_text())
    return [
        ["host lost: its workers at that moment", at_work, at_work > 0],
        ["host lost: tasks there were", f"{before} of {_tasks(store)}", before < _tasks(store)],
        ["host lost: pass finished, store identical", "", code == 0 and contents(store) == reference],
    ]


def _teachers(machine: Machine) -> int:
    _, output = machine.run(["pgrep", "--count", "--full", "ray::TaskWorker"])
    return int(output)


def token_kept(machines: Machines) -> Row:
    """Checks that no file that Ray writes contains the token."""
    token = (machines[LAPTOP].own / "ray/auth_token").read_bytes()
    files = [
        path
        for name in (LAPTOP, HEAD, *WORKERS)
        for path in (machines[name].own / "tmp").rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    leaks = [path for path in files if token in path.read_bytes()]
    for path in leaks:
        _say(f"{path} contains the token")
    return ["files of Ray without the token", len(files), bool(files) and not leaks]


def _log_holds(log: Path, *words: str) -> bool:
    text = log.read_text()
    return all(word in text for word in words)


def _tasks(store: Path) -> int:
    """Returns the number of tasks of the training text, over all masking epochs."""
    root = str(store)
    rows = [index.rows for index, _ in read_parts(root, "train", finished_parts(root, "train"))]
    return SplitPlan.of("train", tuple(rows), read_spec(root).plan).task_count


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MINUTES
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1.0)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    command(main)
