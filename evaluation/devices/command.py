"""``python -m evaluation.main export``: a model directory as files for devices, or as a page for browsers."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from infra import console
from infra.errors import UserError
from infra.files import storage
from infra.files.paths import expand_home

if TYPE_CHECKING:
    from evaluation.devices.site import SiteModel
    from evaluation.tasks.task import Task

_WEB = ("teacher", "task", "labels", "data", "compared")
"""Options that go with --web."""
COMPARED = 100
"""Examples of a dev set on which the page can be compared with Python."""


def export_command(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    loose = next((name for name in _WEB if getattr(options, name) and not options.web), None)
    if loose:
        raise UserError(f"--{loose}: goes with --web")
    return _export_page(options) if options.web else _export_files(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.main export", description="Write a model directory as files for devices."
    )
    parser.add_argument(
        "--model", type=expand_home, required=True, help="directory or hub name, fine-tuned or an encoder"
    )
    parser.add_argument("--output", type=expand_home, required=True, help="directory of the files")
    parser.add_argument("--web", action="store_true", help="write a page that runs the model in a browser")
    parser.add_argument("--teacher", type=expand_home, help="with --web: the same for the fine-tuned teacher")
    parser.add_argument("--task", help="with --web: name of the task, for example SQuAD")
    parser.add_argument("--labels", help="with --web: names of the classes, comma-separated")
    parser.add_argument(
        "--data", type=expand_home, help="with --web: official task files, to compare the page with Python"
    )
    parser.add_argument(
        "--compared", type=int, help=f"with --data: this many examples of the dev set (default {COMPARED})"
    )
    return parser


def _export_files(options: argparse.Namespace) -> int:
    from evaluation.devices.exported import finished
    from evaluation.models import local_directory, require_model

    with local_directory(options.model) as model:
        require_model(model)
        summary = finished(model, options.output)
        if summary is None:
            storage.require_writable(options.output)
            from evaluation.devices.export import export

            summary = export(model, options.output)
    lines = [[name, f"{size / 1e6:.2f} MB"] for name, size in summary["bytes"].items()]
    print(console.table(lines, ("file", "size")))
    difference = summary["difference"]
    print(
        f"largest difference from torch: float32 {difference['float32']:.1e}, int8 {difference['int8']:.1e}"
    )
    print(storage.join(options.output, "export.json"))
    return 0


def _export_page(options: argparse.Namespace) -> int:
    from evaluation.devices.page_bundle import built_page
    from evaluation.devices.site import add_to_site
    from evaluation.models import local_directory, require_model

    with contextlib.ExitStack() as stack:
        roles = {"student": options.model, "teacher": options.teacher}
        found = {role: stack.enter_context(local_directory(name)) for role, name in roles.items() if name}
        for directory in found.values():
            require_model(directory)
        models = [_site_model(options, role, directory) for role, directory in found.items()]
        storage.require_writable(options.output)
        site = add_to_site(options.output, built_page(), models)
    rows = [
        [task["name"], model["role"], f"{model['graph']['bytes'] / 1e6:.2f} MB"]
        for task in site["tasks"]
        for model in task["models"]
    ]
    print(console.table(rows, ("task", "model", "size")))
    print(f"{options.output}: serve it with any host, for example python -m http.server -d {options.output}")
    return 0


def _site_model(options: argparse.Namespace, role: str, directory: str) -> SiteModel:
    from evaluation import names
    from evaluation.devices.site import SiteModel
    from evaluation.tasks.catalogue import TASKS, find_task

    source = options.teacher if role == "teacher" else options.model
    known = options.task and options.task.lower() in map(str.lower, TASKS)
    task = find_task(options.task) if known else None
    return SiteModel(
        directory=directory,
        role=role,
        name=names.names_of(names.source_of(source))[0],
        task=task.name if task else options.task or "Model",
        length=task.max_length if task else None,
        labels=tuple(options.labels.split(",")) if options.labels else (),
        golden=_texts(options, task) if options.data else (),
    )


def _texts(options: argparse.Namespace, task: Task | None) -> tuple[tuple[str, ...], ...]:
    """Texts of the first rows of the task's dev set; questions with their contexts for SQuAD."""
    from evaluation.tasks.loading import load

    if task is None:
        raise UserError("--data: give --task, the name of a known task, whose dev set is read")
    split = load(task, task.dev_parts[0], options.data)
    texts = [(item.question, item.context) for item in split.questions] or split.texts
    return tuple(texts[: options.compared or COMPARED])
