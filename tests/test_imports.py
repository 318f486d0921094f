"""The import rules of ARCHITECTURE.md, checked on the syntax trees of all modules."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("offline_teacher", "student_train", "evaluation")
PACKAGES = (*STAGES, "infra")
STORE = "offline_teacher/store/"
SHARED = (
    *("offline_teacher.store", "offline_teacher.inputs.stored_teacher"),
    *("offline_teacher.families", "offline_teacher.models"),
)
"""What other stages may import of the teacher's."""

ONLY_IN = {
    "ray": {"infra/ray_cluster.py", "offline_teacher/cluster/pool.py", "evaluation/finetuning/parallel.py"},
    "deepspeed": {"student_train/engine/engine.py", "student_train/engine/world.py"},
    "mlflow": {
        f"infra/tracking/{name}.py"
        for name in ("mlflow_sender", "registered_model", "served_model", "system")
    },
    "datasets": {"offline_teacher/corpus/hub.py", "evaluation/tasks/row_files.py"},
}
STORE_MAY = {
    "numpy",
    "pyarrow",
    "xxhash",
    "infra.files.cache",
    "infra.errors",
    "infra.files.os_errors",
    "infra.files.storage",
    "infra.trees",
}
NEVER = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

ROOMS = (
    *("infra", "infra/files", "infra/settings/sections", "infra/settings", "infra/cpu", "infra/tracking"),
    *("infra/demo", "infra/sizing"),
    *(f"offline_teacher/{room}" for room in ("families", "models", "corpus", "store", "sequences", "inputs")),
    *(f"offline_teacher/{room}" for room in ("inference", "cluster", "running", "verification", "planning")),
    "offline_teacher",
    *(f"student_train/{room}" for room in ("engine", "data", "student", "objectives")),
    "student_train",
    *(f"evaluation/{room}" for room in ("measures", "tasks", "kinds", "sources", "candidates")),
    *(f"evaluation/{room}" for room in ("finetuning", "devices", "web", "report")),
    *("evaluation", "evaluation/examples"),
)
"""Every folder of modules. The modules of a folder import from folders before it, and from their own."""

MODULES = sorted(
    path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
)


def imports(module: str) -> list[tuple[str, bool]]:
    """(full name, whether at the top level) of everything a module imports."""
    tree = ast.parse((ROOT / module).read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("module", MODULES)
def test_no_stage_imports_against_the_flow(module: str) -> None:
    home = module.partition("/")[0]
    for name, _ in imports(module):
        stage = name.partition(".")[0]
        if stage not in STAGES or stage == home:
            continue
        assert home != "infra", f"{module} imports {name}: infra imports no stage"
        assert any(within(name, shared) for shared in SHARED), f"{module} imports {name}, of another stage"


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(STORE)])
def test_the_store_needs_next_to_nothing(module: str) -> None:
    for name, _ in imports(module):
        standard = name.partition(".")[0] in sys.stdlib_module_names
        own = within(name, "offline_teacher.store")
        assert standard or own or any(within(name, allowed) for allowed in STORE_MAY), f"{module}: {name}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_stay_in_their_room(module: str) -> None:
    for name, at_top in imports(module):
        package = name.partition(".")[0]
        assert module in ONLY_IN.get(package, {module}), f"{module} imports {name}"
        assert package != "datasets" or not at_top, f"{module} imports {name} outside a function"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles(module: str) -> None:
    for name, _ in imports(module):
        assert name.partition(".")[0] not in NEVER, f"{module} imports {name}"
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = f"{ast.unparse(node.func.value)}.{node.func.attr}"
            assert called not in ("torch.load", "torch.save"), f"{module}:{node.lineno} calls {called}"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert ast.unparse(node.value) == "False", f"{module}: {node.arg}={ast.unparse(node.value)}"


def test_the_rules_have_modules_to_hold_for() -> None:
    assert any(module.startswith(STORE) for module in MODULES)
    assert {module.partition("/")[0] for module in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_one_way(module: str) -> None:
    own = ROOMS.index(str(Path(module).parent))
    for name, _ in imports(module):
        parts = name.split(".")
        if parts[0] not in PACKAGES:
            continue
        while not (ROOT.joinpath(*parts).with_suffix(".py")).is_file() and not ROOT.joinpath(*parts).is_dir():
            parts.pop()
        path = ROOT.joinpath(*parts)
        room = (path if path.is_dir() else path.parent).relative_to(ROOT).as_posix()
        assert ROOMS.index(room) <= own, f"{module} imports {name}: {room} comes after its own room"
