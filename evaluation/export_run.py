"""``python -m evaluation.main export``: a model directory as files for devices, or as a page for browsers."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from infra import console
from infra.errors import UserError
from infra.files import storage
from infra.files.paths import expand_home

if TYPE_CHECKING:
    from evaluation.tasks.task import Task
    from evaluation.web.site import SiteModel
    from infra.settings.recipe import Recipe

_WEB = ("recipe", "teacher", "labels", "compared")
"""Options that go with --web."""
PAGE_KINDS = ("spans", "classification", "regression")
"""Kinds of tasks that the page has a form for. A model without a task gets a form that compares sentences."""
COMPARED = 100
"""Examples of a dev set on which the page can be compared with Python."""


def export_command(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if bool(options.model) == bool(options.recipe):
        raise UserError("export: give either --model DIR or, with --web, --recipe FILE")
    loose = next((name for name in _WEB if getattr(options, name) and not options.web), None)
    if loose:
        raise UserError(f"--{loose}: goes with --web")
    if options.vocabulary and not options.data:
        raise UserError("--vocabulary: give --task and --data, whose training texts say which tokens to keep")
    return _export_page(options) if options.web else _export_files(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.main export", description="Write a model directory as files for devices."
    )
    add = parser.add_argument
    add("--model", type=expand_home, help="directory or hub name, fine-tuned or an encoder")
    add("--output", type=expand_home, required=True, help="directory of the files")
    add("--task", help="name of the task, for example SQuAD")
    add("--data", type=expand_home, help="directory of official task files")
    add("--vocabulary", type=int, help="with --data: leave this many tokens, the most frequent of its texts")
    add("--embedding-bits", type=int, choices=(8, 4), default=8, help="of word embeddings (default 8)")
    add("--web", action="store_true", help="write a page that runs the model in a browser")
    add("--teacher", type=expand_home, help="with --web: also this fine-tuned teacher, in int8")
    add(
        "--recipe", type=expand_home, help="with --web: the fine-tuned models of a recipe, instead of --model"
    )
    add("--labels", help="with --web: names of the classes, comma-separated")
    add(
        "--compared", type=int, help=f"with --web and --data: examples for the self-test (default {COMPARED})"
    )
    return parser


def _export_files(options: argparse.Namespace) -> int:
    from evaluation.devices.export_files import finished
    from evaluation.models import local_directory, require_model

    with contextlib.ExitStack() as stack:
        model = stack.enter_context(local_directory(options.model))
        require_model(model)
        if options.vocabulary:
            model = _trimmed(options, model, stack)
        summary = finished(model, options.output, options.embedding_bits)
        if summary is None:
            storage.require_writable(options.output)
            from evaluation.devices.export import export

            summary = export(model, options.output, options.embedding_bits)
    lines = [[name, f"{size / 1e6:.2f} MB"] for name, size in summary["bytes"].items()]
    print(console.table(lines, ("file", "size")))
    difference = summary["difference"]
    print(
        f"largest difference from torch: float32 {difference['float32']:.1e}, int8 {difference['int8']:.1e}"
    )
    print(storage.join(options.output, "export.json"))
    return 0


def _export_page(options: argparse.Namespace) -> int:
    from evaluation.web.page_bundle import built_page
    from evaluation.web.site import add_to_site

    with contextlib.ExitStack() as stack:
        models = _recipe_models(options) if options.recipe else _models_of_directories(options, stack)
        storage.require_writable(options.output)
        site = add_to_site(options.output, built_page(), models)
    rows = [
        [task["name"], model["role"], model["name"], f"{model['graph']['bytes'] / 1e6:.2f} MB"]
        for task in site["tasks"]
        for model in task["models"]
    ]
    print(console.table(rows, ("task", "model", "shape", "size")))
    print(f"{options.output}: serve it with any host, for example python -m http.server -d {options.output}")
    return 0


def _models_of_directories(options: argparse.Namespace, stack: contextlib.ExitStack) -> list[SiteModel]:
    from evaluation.models import local_directory, require_model
    from evaluation.web.site import SiteModel

    task = _catalogue_task(options.task)
    if task and task.kind not in PAGE_KINDS:
        raise UserError(f"--task {task.name}: the page has no form for tasks of kind {task.kind!r}")
    directories = {
        role: stack.enter_context(local_directory(source))
        for role, source in (("student", options.model), ("teacher", options.teacher))
        if source
    }
    for directory in directories.values():
        require_model(directory)
    examples = _texts(task, "dev", options.data)[: options.compared or COMPARED] if options.data else []
    if options.vocabulary:
        directories["student"] = _trimmed(options, directories["student"], stack)
    return [
        SiteModel(
            directory=directory,
            role=role,
            task=task.name if task else options.task or "Model",
            length=task.max_length if task else None,
            texts=len(task.texts) if task else None,
            labels=tuple(options.labels.split(",")) if options.labels else (),
            golden=tuple(examples),
            embedding_bits=options.embedding_bits if role == "student" else 8,
        )
        for role, directory in directories.items()
    ]


def _recipe_models(options: argparse.Namespace) -> list[SiteModel]:
    from infra.settings.recipe_file import load_recipe

    recipe = load_recipe(options.recipe)
    return models_of_recipe(recipe, options.embedding_bits, options.compared or COMPARED)


def models_of_recipe(recipe: Recipe, embedding_bits: int = 8, compared: int = COMPARED) -> list[SiteModel]:
    """The fine-tuned students, and the teacher, of every task that the recipe's evaluation has finished.

    ``embedding_bits`` of students; ``compared`` examples of a task for the self-test. Raises UserError where
    nothing is finished.
    """
    from evaluation.tasks.catalogue import find_tasks
    from evaluation.web.site import SiteModel

    settings, found = recipe.evaluation, []
    for task in [task for task in find_tasks(settings.tasks) if task.kind in PAGE_KINDS]:
        examples = _texts(task, "dev", settings.data)[:compared]
        for role in (*recipe.runs(), "teacher"):
            directory = storage.join(recipe.evaluation_dir, "scores", role, task.name, "model")
            if storage.exists(storage.join(directory, "config.json")):
                found.append(
                    SiteModel(
                        directory=directory,
                        role=role,
                        task=task.name,
                        length=task.max_length or settings.max_length,
                        texts=len(task.texts),
                        golden=tuple(examples),
                        embedding_bits=embedding_bits if role != "teacher" else 8,
                    )
                )
    if not found:
        raise UserError(f"{recipe.name}: no fine-tuned models for the page yet; evaluate the recipe first")
    return found


def _trimmed(options: argparse.Namespace, directory: str, stack: contextlib.ExitStack) -> str:
    """A copy of the model whose vocabulary is that of the task's training texts."""
    from evaluation.devices.trimming import trim

    target = stack.enter_context(tempfile.TemporaryDirectory())
    texts = (text for row in _texts(_catalogue_task(options.task), "train", options.data) for text in row)
    trim(directory, dict.fromkeys(texts), options.vocabulary, target)
    return target


def _catalogue_task(name: str | None) -> Task | None:
    """The task of the catalogue, or None for a name of the user's own."""
    from evaluation.tasks.catalogue import TASKS, find_task

    return find_task(name) if name and name.lower() in map(str.lower, TASKS) else None


def _texts(task: Task | None, part: str, data: str | None) -> list[tuple[str, ...]]:
    """The texts of a part of a task; for SQuAD questions with their contexts."""
    from evaluation.tasks.loading import load

    if task is None:
        raise UserError("--data: give --task, the name of a known task, whose files are read")
    split = load(task, part if part == "train" else task.dev_parts[0], data)
    return [(item.question, item.context) for item in split.questions] or list(split.texts)
