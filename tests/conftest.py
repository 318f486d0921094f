"""What every test shares. Settings of the machine stand here, before any library reads them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.s3_server import FaultyProxy, s3_server

if TYPE_CHECKING:
    from student_train.engine.world import World

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, deepspeed, ray
for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_TRACKING_", "RAY_ADDRESS"))]:
    del os.environ[name]

# The suite is a function of the tree: the same examples each time. Timings are the machine's affair.
# HYPOTHESIS_PROFILE=explore draws new ones, more of them: for looking for faults, not for judging a change.
settings.register_profile("tests", deadline=None, max_examples=100, database=None, derandomize=True)
settings.register_profile(
    "explore", deadline=None, max_examples=2000, database=None, derandomize=False, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side (``make test``), the slow files come first, so that none runs on alone at the end."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        slow = any(mark.name in ("end_to_end", "services") for mark in item.iter_markers())
        return not slow, len(item.path.parts)  # those of all stages lie highest, and are the longest

    if hasattr(config, "workerinput"):  # this is one of pytest-xdist's processes
        items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """No test cuts the power, so none has to wait for the disk. Other processes still do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def root_dir() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real texts and a real teacher beside the repository; a test that needs them is skipped without."""
    found = ROOT.parent / "shared"
    if not (found / "data").is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return found


@pytest.fixture(scope="session")
def world() -> World:
    """This process as the only rank. The environment variables that `start_world` sets are removed again."""
    from student_train.engine.world import start_world

    before = dict(os.environ)
    started = start_world()
    os.environ.clear()
    os.environ.update(before)
    return started


@pytest.fixture
def alone(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Lets the student command run within this process. All such tests share torch's process
    group, so the command neither starts nor ends it."""
    from student_train.engine import world as worlds

    monkeypatch.setattr(worlds, "start_world", lambda: world)
    monkeypatch.setattr(worlds.World, "close", lambda self: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    return world


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without a run, which take seconds to create."""
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    uri = f"sqlite:///{path}"
    MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> None:
    """The output ``runs`` has MLflow's tables, for tests whose subject is not how these are created."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    shutil.copy(empty_database, tmp_path / "runs/mlflow.db")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server that all tests share, each with a bucket of its own."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The server behind a proxy, as this process's S3; waits between attempts are short."""
    import s3fs

    from infra.files import remote

    with FaultyProxy(s3_endpoint) as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
        monkeypatch.setattr(remote, "LONGEST_WAIT", 0.02)
        remote._filesystem.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        remote._filesystem.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(proxy: FaultyProxy, request: pytest.FixtureRequest) -> str:
    """``s3://`` and a bucket of this test's own."""
    import boto3

    name = f"test-{abs(hash(request.node.nodeid)) % 10**12}"
    boto3.client("s3").create_bucket(Bucket=name)
    proxy.seen.clear()
    return f"s3://{name}"
