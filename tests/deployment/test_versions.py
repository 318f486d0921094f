"""One Python and one Ray: in every image, on every cluster node, and in what the project declares."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT

DEPLOY = ROOT / "infra" / "deploy"
INSTALL = "infra/deploy/install/install.sh"
PIN = (DEPLOY / "install" / "python-version").read_text().strip()
MINOR = PIN.rpartition(".")[0]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SUPPORTED = SpecifierSet(PROJECT["project"]["requires-python"])
MINORS = [f"3.{minor}" for minor in range(30) if f"3.{minor}" in SUPPORTED]
IMAGES = [*sorted((DEPLOY / "docker").glob("*.Dockerfile")), DEPLOY / "mlflow" / "Dockerfile"]
CLUSTERS = [DEPLOY / "ray" / f"{name}.yaml" for name in ("aws", "gcp", "on_premise")]
DEPLOYED = [
    *IMAGES, *CLUSTERS, DEPLOY / "install" / "install.sh", *sorted(DEPLOY.glob("*/compose.yaml")),
    *sorted((DEPLOY / "kubernetes").glob("*.yaml")), *sorted((DEPLOY / "slurm").iterdir()),
]  # fmt: skip


def named(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def workflow() -> dict[str, dict[str, object]]:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def test_the_pin_names_a_patch_release_that_the_project_supports() -> None:
    """Ray compares versions of Python to the patch level when a node joins."""
    assert re.fullmatch(r"3\.\d+\.\d+", PIN)
    assert PIN in SUPPORTED


def test_what_is_declared_supported_is_what_is_checked() -> None:
    """pyproject.toml, ruff, mypy, CI, the Makefile and the documentation name the same minor versions."""
    assert workflow()["test"]["strategy"]["matrix"]["python"] == MINORS  # type: ignore[index]
    assert PROJECT["tool"]["mypy"]["python_version"] == MINORS[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{MINORS[0].replace('.', '')}"
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"python(3\.\d+)", makefile) == MINORS
    bounds = re.findall(r"\(3, (\d+)\) <= .*? < \(3, (\d+)\)", makefile)
    assert bounds
    assert {tuple(f"3.{number}" for number in pair) for pair in bounds} == {
        (MINORS[0], f"3.{int(MINORS[-1][2:]) + 1}")
    }
    words = f"{', '.join(MINORS[:-1])} or {MINORS[-1]}"
    assert f"Python {words}" in (ROOT / "README.md").read_text()
    assert f"Python {words}" in makefile


@pytest.mark.parametrize("path", DEPLOYED, ids=named)
def test_no_deployment_file_chooses_a_python_of_its_own(path: Path) -> None:
    found = re.findall(r"python[:=-]*\d\.\d[\w.-]*|\bpy3\d+\b|deadsnakes", path.read_text(), re.IGNORECASE)
    assert not found, f"{named(path)} names {found}; infra/deploy/install/python-version is the one place"


FAKE_PYTHON = """#!/bin/sh
mkdir -p "$3/bin"
for tool in pip uv; do
  printf '#!/bin/sh\\necho %s "$@" >> "$CALLS"\\n' $tool > "$3/bin/$tool" && chmod +x "$3/bin/$tool"
done
"""


def calls(tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """What install.sh calls pip and uv with; a `python3` that makes no environment stands in its PATH."""
    fake = tmp_path / "python3"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    log = tmp_path / "calls"
    values = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(log), **environment}
    command = ["sh", INSTALL, *arguments, str(tmp_path / "venv")]
    subprocess.run(command, cwd=ROOT, env=values, check=True)
    return log.read_text().splitlines()


def test_the_script_installs_the_pinned_interpreter_and_pinned_packages(tmp_path: Path) -> None:
    tool, venv, torch, packages, project = [
        *calls(tmp_path, "dependencies", EXTRAS="s3 gs"),
        *calls(tmp_path, "project")[-1:],
    ]
    assert re.fullmatch(r"pip install --quiet uv==\d+\.\d+\.\d+", tool)
    assert f" --python {PIN} {tmp_path}/venv" in venv
    for line in (torch, packages, project):
        assert line.startswith(f"uv pip install --quiet --python {tmp_path}/venv/bin/python")
        assert " --constraints constraints.txt " in line
    assert torch.endswith(" torch setuptools wheel")
    assert packages.endswith(" --requirements pyproject.toml --extra s3 --extra gs")
    assert " --no-deps " in project
    assert project.endswith(" .")


def test_the_tracking_server_has_the_same_interpreter_and_pins(tmp_path: Path) -> None:
    _, venv, packages = calls(tmp_path, "server")
    assert f" --python {PIN} " in venv
    assert packages.endswith(" --constraints constraints.txt mlflow boto3 psycopg2-binary")


@pytest.mark.parametrize("path", IMAGES, ids=named)
def test_image_installs_with_the_script_and_nothing_else(path: Path) -> None:
    text = path.read_text()
    assert re.search(rf"^RUN {INSTALL} system && .*{INSTALL} (dependencies|server) /opt/venv", text, re.M)
    assert "pip install" not in text
    assert "apt-get" not in text
    assert "ENV PATH=/opt/venv/bin:$PATH" in text
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    assert {
        "constraints.txt",
        "pyproject.toml",
        "evaluation",
        "infra",
        "offline_teacher",
        "student_train",
    } <= kept
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all(name == "." or name.split("/")[0] in kept for name in copied.split())


@pytest.mark.parametrize("path", IMAGES[:-1], ids=named)
def test_an_edited_source_file_reinstalls_no_package(path: Path) -> None:
    """Before the packages are installed, an image holds the files that decide about them and no other."""
    before, _, after = path.read_text().partition("install.sh dependencies")
    assert re.findall(r"^COPY (.*)$", before, re.M) == [
        "infra/deploy/install/ infra/deploy/install/",
        "constraints.txt pyproject.toml ./",
    ]
    assert after.index("COPY . .") < after.index(f"RUN {INSTALL} project /opt/venv")


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_cluster_nodes_install_with_the_script_and_nothing_else(path: Path) -> None:
    cluster = yaml.safe_load(path.read_text())
    setup = [line for line in cluster["setup_commands"] if "RAY_AUTH_MODE" not in line]
    words = [re.sub(r"^cd ~/distillation && (sudo |EXTRAS=\w+ )?", "", line) for line in setup]
    steps = [f"{INSTALL} dependencies ~/venv", f"{INSTALL} project ~/venv"]
    assert words[-2:] == steps
    assert words[:-2] in ([], [f"{INSTALL} system"])
    assert cluster["head_setup_commands"] == cluster["worker_setup_commands"] == []
    for line in (*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]):
        assert "~/venv/bin/ray" in line


def test_ray_is_the_pinned_one_wherever_it_is_named() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    job = yaml.safe_load((DEPLOY / "kubernetes" / "teacher.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    for path in DEPLOYED:
        named_versions = re.findall(r"ray(?:\[\w+\])?==([\d.]+)", path.read_text())
        assert set(named_versions) <= {pins["ray"]}, named(path)


def test_ci_builds_every_image_and_asks_each_for_its_python() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    built = workflow()["images"]["strategy"]["matrix"]["dockerfile"]  # type: ignore[index]
    assert {ROOT / name for name in built} == set(IMAGES)
    assert 'docker build -f "${{ matrix.dockerfile }}"' in text
    assert "infra/deploy/install/python-version" in text


def test_images_of_others_are_pinned_by_digest() -> None:
    """A tag can be moved to another image; a digest cannot."""
    text = "\n".join(path.read_text() for path in DEPLOYED)
    images = re.findall(r"^(?:FROM|\s*image:) (\S+)$", text, re.M)
    foreign = {image for image in images if not re.match(r"(registry\.example\.org/)?distillation:", image)}
    assert {image.split(":")[0] for image in foreign} == {"debian", "nvidia/cuda", "postgres"}
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image) for image in foreign)
