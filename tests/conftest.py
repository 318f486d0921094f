"""What every test shares. Settings of the machine stand here, before any library reads them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

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
