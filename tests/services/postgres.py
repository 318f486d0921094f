"""A PostgreSQL server of one test: its own directory, its own loopback port, stopped and started at will."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.s3_server import free_port

BINARIES = sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1:]


def available() -> bool:
    return bool(BINARIES) or shutil.which("initdb") is not None


class Postgres:
    """As root it runs as ``nobody``: the server refuses root."""

    def __init__(self, directory: Path) -> None:
        self.port, self.data = free_port(), directory / "data"
        self._as = (
            ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.getuid() == 0 else []
        )
        directory.mkdir(parents=True)
        if self._as:
            for parent in directory.parents:
                temporary = Path(tempfile.gettempdir())
                if parent.stat().st_uid == os.getuid() and temporary in parent.parents:
                    parent.chmod(parent.stat().st_mode | 0o011)
            shutil.chown(directory, "nobody", "nogroup")
        self._run("initdb", "-D", str(self.data), "-U", "mlflow", "--auth=trust", "-E", "UTF8", "--no-sync")
        self.start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", "mlflow")

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/mlflow"

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.data} -F"
        log = str(self.data / "log")
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", "120", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", "120", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        path = str(Path(BINARIES[0], program)) if BINARIES else program
        done = (
            subprocess.run(
                [*self._as, path, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd="/",
            )
            if program != "pg_ctl"
            else subprocess.run(
                [*self._as, path, *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd="/",
            )
        )
        assert done.returncode == 0, f"{program}: {done.stdout}"
