"""Deployment files: the real schemas where they are installed, and the promises they make in any case."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.settings.recipe_file import load_recipe
from tests.conftest import ROOT

DEPLOY = ROOT / "infra" / "deploy"
CLUSTERS = sorted((DEPLOY / "ray").glob("[ago]*.yaml"))
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
STAGES = [DEPLOY / "kubernetes" / f"{stage}.yaml" for stage in ("teacher", "student", "evaluation")]
COMPOSE = [DEPLOY / "mlflow" / "compose.yaml", DEPLOY / "docker" / "compose.yaml"]
DOCKERFILES = [*sorted((DEPLOY / "docker").glob("*.Dockerfile")), DEPLOY / "mlflow" / "Dockerfile"]
SCRIPTS = [*sorted((DEPLOY / "slurm").glob("*.sbatch")), DEPLOY / "install" / "install.sh"]


def named(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def containers(value: Any) -> list[dict[str, Any]]:
    """Every container of every pod template in a manifest."""
    if isinstance(value, list):
        return [found for item in value for found in containers(item)]
    if not isinstance(value, dict):
        return []
    here = value.get("containers", [])
    return [
        *here,
        *(found for key, item in value.items() if key != "containers" for found in containers(item)),
    ]


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_cluster_passes_rays_own_validation(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (cluster,) = documents(path)
    validate_config(prepare_config(cluster))
    with pytest.raises(Exception, match="misspelt"):
        validate_config(prepare_config({**cluster, "misspelt": 1}))


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_cluster_keeps_the_token_and_the_dashboard_private(path: Path) -> None:
    (cluster,) = documents(path)
    assert "." in cluster["file_mounts"].values()
    assert "~/.ray/auth_token" in cluster["file_mounts"].values()
    assert any("RAY_AUTH_MODE=token" in line and "venv/bin" in line for line in cluster["setup_commands"])
    (head,) = (line for line in cluster["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in head
    assert {".git", ".venv", "runs"} <= set(cluster["rsync_exclude"])


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_only_workers_are_spot(name: str) -> None:
    (cluster,) = documents(DEPLOY / "ray" / f"{name}.yaml")
    nodes = cluster["available_node_types"]
    assert re.search("spot", str(nodes["gpu_spot"]), re.IGNORECASE)
    assert not re.search("spot|preemptible", str(nodes[cluster["head_node_type"]]), re.IGNORECASE)


def test_google_cloud_takes_the_scheduling_as_one_object() -> None:
    """As compute.v1's ``Scheduling`` has it; of a list of objects the first would be lost."""
    (cluster,) = documents(DEPLOY / "ray" / "gcp.yaml")
    scheduling = cluster["available_node_types"]["gpu_spot"]["node_config"]["scheduling"]
    assert scheduling == {"provisioningModel": "SPOT", "onHostMaintenance": "TERMINATE"}


def test_runtime_environment_is_valid_and_leaves_outputs_behind() -> None:
    from ray.runtime_env import RuntimeEnv

    (environment,) = documents(DEPLOY / "ray" / "runtime_env.yaml")
    assert {".venv", "runs", ".git"} <= set(RuntimeEnv(**environment)["excludes"])


RAY_JOB = {
    "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec",
}  # fmt: skip
RAY_CLUSTER = {
    "rayVersion", "enableInTreeAutoscaling", "authOptions", "headGroupSpec", "workerGroupSpecs",
}  # fmt: skip
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def test_ray_job_uses_fields_of_kuberays_definition() -> None:
    """The names are of KubeRay 1.7's ray.io_rayjobs.yaml, with which the whole file was compared once."""
    (job,) = documents(DEPLOY / "kubernetes" / "teacher.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= RAY_JOB
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) <= RAY_CLUSTER
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in cluster["workerGroupSpecs"]:
        assert {"groupName", "minReplicas", "maxReplicas", "template"} <= set(group) <= WORKER_GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("path", KUBERNETES, ids=named)
def test_kubernetes_manifest_passes_the_published_schemas(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        if document["apiVersion"].startswith("ray.io/"):
            cluster = document["spec"]["rayClusterSpec"]
            groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
            document = {
                "apiVersion": "v1", "kind": "PodList",
                "items": [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for group in groups],
            }  # fmt: skip
        validate.validate(document, "1.34", strict=True)


@pytest.mark.parametrize("path", KUBERNETES, ids=named)
def test_pods_run_without_root_secrets_or_surprise_images(path: Path) -> None:
    text = path.read_text()
    pods = containers(documents(path))
    assert all(":" in pod["image"] and not pod["image"].endswith(":latest") for pod in pods)
    if not pods:
        assert named(path) == "kubernetes/storage.yaml"
    assert text.count("runAsNonRoot: true") == len(pods)
    assert text.count("seccompProfile: {type: RuntimeDefault}") == len(pods)
    for pod in pods:
        assert pod["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        for entry in pod.get("env", []):
            if re.search("PASS|SECRET|TOKEN", entry["name"]):
                assert set(entry) == {"name", "valueFrom"}


def _all(value: Any, key: str) -> list[Any]:
    """Every value of ``key`` in a manifest, at any depth."""
    if isinstance(value, list):
        return [found for item in value for found in _all(item, key)]
    if not isinstance(value, dict):
        return []
    here = [value[key]] if key in value else []
    return here + [found for item in value.values() for found in _all(item, key)]


def test_what_manifests_refer_to_exists() -> None:
    """Claims, accounts and services are in these files, secrets in the README, volumes in their own pod."""
    everything = [document for path in KUBERNETES for document in documents(path)]
    made = {(document["kind"], document["metadata"]["name"]) for document in everything}
    for claim in _all(everything, "claimName"):
        assert ("PersistentVolumeClaim", claim) in made
    for account in _all(everything, "serviceAccountName"):
        assert ("ServiceAccount", account) in made
    readme = (DEPLOY / "kubernetes" / "README.md").read_text()
    for reference in _all(everything, "secretKeyRef"):
        assert f"`{reference['name']}`" in readme
        assert f"`{reference['key']}`" in readme
    assert {("Service", "mlflow"), ("Service", "postgres"), ("Deployment", "mlflow")} <= made
    for pod in (spec for spec in _all(everything, "spec") if "containers" in spec):
        mounted = {mount["name"] for one in pod["containers"] for mount in one.get("volumeMounts", [])}
        assert mounted - {"database"} == {volume["name"] for volume in pod.get("volumes", [])}


@pytest.mark.parametrize("path", STAGES, ids=named)
def test_stages_share_one_store_and_track_on_the_server(path: Path) -> None:
    """Without ``tracking.uri``, runs would be tracked in SQLite on the shared file system."""
    words = re.findall(r"[\w./:=-]+", path.read_text())
    assert words.count("store.path=s3://REPLACE/stores/wikitext103") == 1
    assert words.count("output=/runs") == 1
    assert words.count("tracking.uri=http://mlflow:5000") == 1


@pytest.mark.parametrize(
    "path", [DEPLOY / "mlflow" / "compose.yaml", DEPLOY / "kubernetes" / "mlflow.yaml"], ids=named
)
def test_tracking_server_keeps_its_database_in_postgres_on_a_volume_of_its_own(path: Path) -> None:
    text = path.read_text()
    assert "--backend-store-uri=postgresql+psycopg2://mlflow@postgres/mlflow" in text
    assert "sqlite" not in text
    everything = documents(path)
    if "compose" in path.name:
        (compose,) = everything
        mounts = {name: service["volumes"] for name, service in compose["services"].items()}
        assert mounts == {
            "postgres": ["postgres:/var/lib/postgresql/data"],
            "mlflow": ["artifacts:/artifacts"],
        }
        assert set(compose["volumes"]) == {"postgres", "artifacts"}
        assert compose["networks"] == {"database": {"internal": True}}
    else:
        assert _all(everything, "accessModes") == [["ReadWriteOnce"], ["ReadWriteOnce"]]
        assert "ReadWriteMany" not in text


@pytest.mark.parametrize("path", KUBERNETES, ids=named)
def test_commands_of_manifests_name_recipes_and_settings_that_exist(path: Path) -> None:
    words = re.findall(r"[\w./=:-]+", path.read_text())
    recipes = [
        word.removeprefix("--recipe=") for word in words if word.endswith(".yaml") and "recipes/" in word
    ]
    overrides = [w for w in words if re.match(r"(output|(store|teacher|train|tracking)\.\w+)=", w)]
    for recipe in recipes:
        load_recipe(str(ROOT / recipe), overrides)


@pytest.mark.parametrize("path", COMPOSE, ids=named)
def test_compose_publishes_on_loopback_only_and_holds_no_secret(path: Path) -> None:
    (compose,) = documents(path)
    for name, service in compose["services"].items():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY", key):
                assert str(value).startswith("${"), (name, key)
        if "image" in service and "build" not in service:
            assert re.search(r":[\w.-]*\d", service["image"]), f"{name}: no version"
        for other in service.get("depends_on", {}):
            assert other in compose["services"] or other == "mlflow"
    for line in (DEPLOY / "mlflow" / "env.example").read_text().splitlines():
        assert line.startswith("#") or line.endswith("=")


def test_compose_asks_for_exactly_the_variables_of_the_example() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "mlflow" / "compose.yaml").read_text()))
    given = set(re.findall(r"^(\w+)=", (DEPLOY / "mlflow" / "env.example").read_text(), re.MULTILINE))
    assert asked == given


def test_secrets_file_is_ignored_by_git_and_by_image_builds() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().split()
    assert "**/.env" in (ROOT / ".dockerignore").read_text().split()


@pytest.mark.parametrize("path", DOCKERFILES, ids=named)
def test_image_runs_as_a_user_on_a_base_of_a_named_version(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^USER 1000$", text, re.MULTILINE)
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert ":" in base
    assert not base.endswith(":latest")


@pytest.mark.parametrize("path", DOCKERFILES, ids=named)
def test_hadolint(path: Path) -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed")
    config = DEPLOY / "docker" / ".hadolint.yaml"
    done = subprocess.run(["hadolint", "-c", config, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_scripts_parse_and_pass_shellcheck(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_slurm_signals_the_ranks_and_not_srun() -> None:
    """srun answers SIGTERM by killing its tasks, before they have written a checkpoint."""
    text = (DEPLOY / "slurm" / "student.sbatch").read_text()
    (trap,) = re.findall(r"^trap '(.*)' TERM$", text, re.MULTILINE)
    assert 'scancel --signal=TERM "$SLURM_JOB_ID.0"' in trap
    assert "kill" not in trap
