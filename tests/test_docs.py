"""The documentation as a reader would use it: links, recipes, settings and commands hold."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.settings.recipe_file import load_recipe
from tests.conftest import ROOT

DOCUMENTS = [
    *(path for path in sorted(ROOT.glob("*.md"))),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "infra").rglob("*.md")),
    *sorted((ROOT / "offline_teacher").rglob("*.md")),
]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[str]:
    """Lines of shell blocks, continued ones joined, comments cut off."""
    found = []
    for block in re.findall(r"```(?:bash|sh|shell)\n(.*?)```", text, re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [re.sub(r"\s+#.*", "", line).strip() for line in lines if not line.startswith("#")]
    return [line for line in found if line]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"[a-z]+:", target) and not target.startswith("#"):
            assert (path.parent / target.partition("#")[0]).exists(), f"{named(path)}: {target}"


def test_the_page_of_modules_lists_every_module_and_no_other() -> None:
    """Each under its package's heading, in rows of `folder/` `module` `module` | job."""
    text = (ROOT / "docs" / "modules.md").read_text()
    for section in re.split(r"^(?=\*\*\w+\*\*, )", text, flags=re.MULTILINE)[1:]:
        package = section[2:].partition("*")[0]
        listed = set()
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
            words = re.findall(r"`([^`]+)`", row)
            folder = words.pop(0) if words[0].endswith("/") else ""
            listed |= {f"{folder}{word}.py" for word in words}
        files = (ROOT / package).rglob("*.py")
        assert listed == {p.relative_to(ROOT / package).as_posix() for p in files if p.name != "__init__.py"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_recipes_and_settings_named_exist(path: Path) -> None:
    text = path.read_text()
    for recipe in set(re.findall(r"infra/recipes/[\w.-]+\.yaml", text)):
        load_recipe(str(ROOT / recipe))
    recipe = str(ROOT / "infra" / "recipes" / "demo.yaml")
    for line in commands(text):
        overrides = [
            word for word in shlex.split(line) if re.match(r"(?!tracking\.uri)[a-z]+\.[a-z_]+=", word)
        ]
        load_recipe(recipe, overrides)


def test_recipes_in_the_text_are_valid(tmp_path: Path) -> None:
    found = 0
    for path in DOCUMENTS:
        for block in re.findall(r"```yaml\n(name: .*?)```", path.read_text(), re.DOTALL):
            is_task = re.search(r"^kind:", block, re.MULTILINE)
            if not is_task and re.search(r"^(corpus|store):", block, re.MULTILINE):
                (tmp_path / "recipe.yaml").write_text(block)
                load_recipe(str(tmp_path / "recipe.yaml"))
                found += 1
    assert found


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named_targets = set(re.findall(r"`make ([a-z]+)", path.read_text()))
    named_targets |= {words[1] for line in commands(path.read_text()) if (words := line.split())[0] == "make"}
    assert named_targets <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_commands_are_understood(path: Path) -> None:
    for line in commands(path.read_text()):
        words = shlex.split(line)
        for marker, parse in _parsers().items():
            if marker in words:
                arguments = words[words.index(marker) + 1 :]
                errors = io.StringIO()
                try:
                    with contextlib.redirect_stderr(errors):
                        parse(arguments)
                except (SystemExit, UserError) as problem:
                    pytest.fail(f"{named(path)}: {line}: {problem} {errors.getvalue()}")


def _parsers() -> dict[str, Callable[[list[str]], object]]:
    from evaluation.export_run import _parser as _export_parser
    from evaluation.main import _parse
    from infra.sizing.__main__ import _parser as _sizing_parser
    from offline_teacher.main import _parser
    from student_train.main import parse

    return {
        "offline_teacher.main": lambda words: _parser().parse_args(words),
        "student_train/main.py": parse,
        "infra.sizing": lambda words: _sizing_parser().parse_args(words),
        "evaluation.main": lambda words: (
            _export_parser().parse_args(words[1:]) if words[0] == "export" else _parse(words)
        ),
    }
