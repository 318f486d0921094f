"""Hooks of MkDocs: pages of the site that live outside ``docs``, and links to files of the repository.

On GitHub a link such as ``../infra/recipes/demo.yaml`` leads to that file. On the site the same link leads to
a copy of the file, so every page reads alike in both places.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "offline_teacher/store/FORMAT.md": "format.md",
    **{f"infra/deploy/{path.parent.name}/README.md": f"deploy/{path.parent.name}.md"
       for path in sorted((ROOT / "infra" / "deploy").glob("*/README.md"))},
}  # fmt: skip
"""File of the repository -> page of the site."""
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages outside ``docs`` and the files that pages link to."""
    for path, page in PAGES.items():
        if (ROOT / path).exists():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for page in list(files.documentation_pages()):
        for target in _LINK.findall(Path(page.abs_src_path).read_text()):
            linked = _inside(page.abs_src_path, target)
            if linked is None or linked in PAGES or linked.startswith("docs/"):
                continue
            if (ROOT / linked).is_file() and files.get_file_from_path(_copy(linked)) is None:
                files.append(File.generated(config, _copy(linked), abs_src_path=str(ROOT / linked)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with links that are relative to its place on the site."""

    def link(match: re.Match[str]) -> str:
        path = _inside(page.file.abs_src_path, match[1])
        if path is None:
            return match[1]
        place = PAGES.get(path) or (path[len("docs/") :] if path.startswith("docs/") else _copy(path))
        return os.path.relpath(place, os.path.dirname(page.file.src_uri) or ".")

    return _LINK.sub(link, markdown)


def _copy(path: str) -> str:
    """Where the site keeps a file of the repository; as text, so that a browser shows it."""
    return f"files/{path}.txt"


def _inside(page: str, target: str) -> str | None:
    """The file of the repository that a link of ``page`` leads to; None for a link to elsewhere."""
    if re.match(r"[a-z]+:", target):
        return None
    path = os.path.normpath(os.path.join(os.path.dirname(page), target))
    return os.path.relpath(path, ROOT) if path.startswith(f"{ROOT}{os.sep}") else None
