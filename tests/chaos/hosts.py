"""Simulated machines: Linux namespaces on a bridge, with their own addresses, processes, files and sshd.

    with Machines(["node-0", "node-1"], directory) as machines:
        machines["node-0"].run(["ssh", "node-1", "hostname"])

A machine has its own network (a link to a bridge without other connections), process table, host name, /tmp,
/dev/shm and /run. Its home directory is the real one, except that changes stay in the machine, and that
~/.ssh and ~/.ray are its own. All other files are shared, as on a cluster with one file system. sshd accepts
a key that is made for the test, on port 22.

The namespaces have neither names nor files, so the kernel removes them with their last process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil

from infra.errors import UserError
from tests.conftest import ROOT

NETWORK = "10.77.0."
TOOLS = ("ip", "mount", "nsenter", "rsync", "setpriv", "ssh-keygen", "unshare", "/usr/sbin/sshd")
SECONDS = 60.0

# Process 1 of a machine; bash also reaps the orphaned processes of the machine's daemons.
_INIT = """
set -euo pipefail
name=$1 own=$2 home=$3 shared=$4 root=$5
mount -t overlay overlay -o "lowerdir=$home,upperdir=$own/home,workdir=$own/work" "$home"
mount --bind "$own/ssh" "$home/.ssh"
mount --bind "$own/ray" "$home/.ray"
for path in "$shared" "$root"; do
  if [[ $path == /tmp/* ]]; then
    mkdir -p "$own$path"
    mount --bind "$path" "$own$path"
  fi
done
mount --bind "$shared/hosts" /etc/hosts
mount --bind "$shared/resolv.conf" /etc/resolv.conf
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --rbind "$own/tmp" /tmp
hostname "$name"
ip link set lo up
echo up
read -r  # waits until the network is connected
/usr/sbin/sshd -f "$shared/sshd_config" -E "$own/sshd.log"
until (exec 3<>/dev/tcp/127.0.0.1/22) 2>/dev/null; do sleep 0.05; done  # until sshd listens
echo up
sleep infinity &
wait
"""


class Machine:
    """One of `Machines`, in which commands run as after a login."""

    def __init__(self, name: str, address: str, own: Path, process: subprocess.Popen[str], pid: int) -> None:
        self.name, self.address, self.own, self.pid = name, address, own, pid
        self._process = process

    def start(self, command: Sequence[str | Path], log: Path, **environment: str) -> subprocess.Popen[str]:
        """Starts a command in the repository's root directory; its output goes to ``log``."""
        with log.open("a") as output:
            return subprocess.Popen(
                self._inside(command, environment),
                stdout=output, stderr=output, stdin=subprocess.DEVNULL, text=True,
            )  # fmt: skip

    def run(
        self, command: Sequence[str | Path], seconds: float = SECONDS, /, **environment: str
    ) -> tuple[int, str]:
        """Runs a command to its end, and returns its exit code and output."""
        done = subprocess.run(
            self._inside(command, environment),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, timeout=seconds, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    def must(self, command: Sequence[str | Path], seconds: float = SECONDS, /, **environment: str) -> str:
        """Runs a command that must succeed, and returns its output."""
        code, output = self.run(command, seconds, **environment)
        assert code == 0, f"{self.name}: {command} exited with {code}:\n{output[-3000:]}"
        return output

    def lose(self) -> None:
        """Disconnects the network and then kills all processes, so that no connection is closed properly."""
        _ip(self.pid, "link", "set", "eth0", "down")
        self.kill()

    def kill(self) -> None:
        """Kills process 1, upon which the kernel kills every process of the machine."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._process.wait(SECONDS)

    def _inside(self, command: Sequence[str | Path], environment: dict[str, str]) -> list[str]:
        enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--ipc", "--pid"]
        values = [f"{name}={value}" for name, value in environment.items()]
        return [*enter, "env", f"--chdir={ROOT}", *values, *map(str, command)]


class Machines:
    """A context in which machines run; ``directory``, empty at first, is shared by them."""

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        _check()
        self.directory = directory
        self._names, self._machines = names, dict[str, Machine]()
        self._bridge: subprocess.Popen[bytes] | None = None

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def __enter__(self) -> Machines:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)  # sshd refuses keys in a directory that others can write
        addresses = {name: f"{NETWORK}{number}" for number, name in enumerate(self._names, 1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.directory / "hosts").write_text("\n".join(lines) + "\n")
        (self.directory / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # look-ups fail at once
        _write_ssh(self.directory)
        try:
            bridge = subprocess.Popen([*_killed_with_parent(), "unshare", "--net", "sleep", "infinity"])
            self._bridge = bridge
            _wait_for_namespace(bridge.pid)
            _ip(bridge.pid, "link", "add", "bridge", "type", "bridge")
            _ip(bridge.pid, "link", "set", "bridge", "up")
            for name, address in addresses.items():
                self._machines[name] = _boot(name, address, self.directory, bridge.pid)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for machine in self._machines.values():
            machine.kill()
        if self._bridge is not None:
            self._bridge.kill()
            self._bridge.wait(SECONDS)


def _check() -> None:
    if os.geteuid() != 0:
        raise UserError("machines in network namespaces need root; run it again as root")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"machines in network namespaces need {', '.join(missing)};"
            " apt-get install iproute2 mount openssh-server rsync util-linux"
        )


def _killed_with_parent() -> list[str]:
    """Returns the beginning of a command that is killed when this process ends."""
    return ["setpriv", "--pdeathsig", "KILL"]


def _wait_for_namespace(pid: int) -> None:
    """Waits until the process ``pid`` is in another network namespace than this one."""
    ours, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + SECONDS
    while os.readlink(f"/proc/{pid}/ns/net") == ours:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _boot(name: str, address: str, shared: Path, bridge: int) -> Machine:
    own, home = shared / name, Path.home()
    for folder in ("home", "work", "tmp", "ray", "ssh"):
        (own / folder).mkdir(parents=True)
    (own / "tmp").chmod(0o1777)
    (own / "ray").chmod(0o700)
    shutil.copytree(shared / "ssh", own / "ssh", dirs_exist_ok=True)
    (own / "ssh").chmod(0o700)
    for folder in (".ssh", ".ray"):
        (home / folder).mkdir(mode=0o700, exist_ok=True)  # mount points of the machine's own directories
    unshare = [
        "unshare",
        "--net",
        "--mount",
        "--uts",
        "--ipc",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    arguments = [name, own, home, shared, ROOT]
    with (own / "init.log").open("w") as log:
        process = subprocess.Popen(
            [*_killed_with_parent(), *unshare, "bash", "-c", _INIT, "init", *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    _wait_until_up(process, own)
    (init,) = psutil.Process(process.pid).children()
    cable = f"to-{address.rsplit('.', 1)[1]}"
    _ip(bridge, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(init.pid))
    _ip(bridge, "link", "set", cable, "master", "bridge", "up")
    _ip(init.pid, "addr", "add", f"{address}/24", "dev", "eth0")
    _ip(init.pid, "link", "set", "eth0", "up")
    _ip(init.pid, "route", "add", "default", "dev", "eth0")  # Ray looks for the address of the default route
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    _wait_until_up(process, own)
    return Machine(name, address, own, process, init.pid)


def _wait_until_up(process: subprocess.Popen[str], own: Path) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n", f"{own.name}: {(own / 'init.log').read_text()}"


def _ip(pid: int, *words: str) -> None:
    subprocess.run(["nsenter", "--target", str(pid), "--net", "ip", *words], check=True)


def _write_ssh(shared: Path) -> None:
    """Writes one host key and one user key for all machines, and an sshd configuration for these keys."""
    client = shared / "ssh"
    client.mkdir(mode=0o700)
    for path in (shared / "host_key", client / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", path], check=True)
    (client / "authorized_keys").write_text((client / "id_ed25519.pub").read_text())
    host_key = " ".join((shared / "host_key.pub").read_text().split()[:2])
    (client / "known_hosts").write_text(f"* {host_key}\n")
    (shared / "sshd_config").write_text(
        f"HostKey {shared / 'host_key'}\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPubkeyAuthentication yes\n"
        "PermitRootLogin prohibit-password\nUsePAM no\nUseDNS no\nPidFile none\n"
        "Subsystem sftp internal-sftp\n"
    )
