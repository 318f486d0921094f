"""Promises that can be read off the source: what must not be called is not called."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("offline_teacher", "student_train", "evaluation", "infra")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
FORBIDDEN = {
    *(
        "torch.load",
        "torch.save",
        "pickle.load",
        "pickle.loads",
        "pickle.dump",
        "pickle.dumps",
        "marshal.loads",
    ),
    *(
        "joblib.load",
        "dill.load",
        "shelve.open",
        "yaml.unsafe_load",
        "yaml.full_load",
        "eval",
        "exec",
        "os.system",
    ),
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_executed(path: Path) -> None:
    for name, call in calls(path):
        assert name not in FORBIDDEN, f"{path}:{call.lineno}: {name}"
        given = keywords(call)
        assert given.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"
        assert given.get("trust_remote_code", "False") == "False", f"{path}:{call.lineno}"
        assert given.get("shell", "False") == "False", f"{path}:{call.lineno}"
        if name.endswith("yaml.load"):
            assert "_Loader" in ast.unparse(call), f"{path}:{call.lineno}: not the narrowed SafeLoader"
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}, path


def test_weights_are_read_from_safetensors_only() -> None:
    for path in SOURCES:
        for name, call in calls(path):
            if name.endswith(".from_pretrained") and re.search(
                r"AutoModel|ForMaskedLM|_class|architecture", name
            ):
                assert keywords(call).get("use_safetensors") == "True", f"{path}:{call.lineno}"


def test_nothing_listens_beyond_loopback() -> None:
    for path in [*SOURCES, ROOT / "Makefile"]:
        assert "0.0.0.0" not in path.read_text(), path


def test_temporary_files_have_names_nobody_can_guess() -> None:
    for path in SOURCES:
        for name, call in calls(path):
            assert name != "tempfile.mktemp", f"{path}:{call.lineno}"
