"""The command ``python -m evaluation.main export``: writes ONNX files of a model, or a page for browsers."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from infra import console
from infra.errors import UserError
from infra.files import storage
from infra.files.paths import expand_home

if TYPE_CHECKING:
    from evaluation.tasks.task import Task
    from evaluation.web.site import SiteModel
    from infra.settings.recipe import Recipe

_WEB_OPTIONS = ("recipe", "teacher", "labels", "compared")
"""Options that require --web."""
PAGE_KINDS = ("spans", "classification", "regression")
"""Kinds of tasks for which the page has a form; a model without a task gets one that compares sentences."""
SELF_TEST_EXAMPLES = 100
"""Default number of dev examples on which the page's self-test compares its answers with Python's."""


def export_command(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code. Raises UserError for options that contradict each other."""
    options = _parser().parse_args(arguments)
    if bool(options.model) == bool(options.recipe):
        raise UserError("export: give either --model DIR or, with --web, --recipe FILE")
    without_web = next((name for name in _WEB_OPTIONS if getattr(options, name) and not options.web), None)
    if without_web:
        raise UserError(f"--{without_web}: needs --web")
    if options.vocabulary and not options.data:
        reason = "the tokens of the task's training texts are kept"
        raise UserError(f"--vocabulary: needs --task and --data; {reason}")
    return _export_page(options) if options.web else _export_files(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.main export",
        description="Write ONNX files of a model, or a page that runs it.",
    )
    add = parser.add_argument
    kept = "with --task and --data: keep this number of tokens, the most frequent of the training texts"
    recipe = "with --web: recipe whose fine-tuned models are written, instead of --model"
    compared = (
        f"with --web and --data: number of dev examples in the self-test (default {SELF_TEST_EXAMPLES})"
    )
    bits = "bits per word-embedding value (default 8)"
    add("--model", type=expand_home, help="directory or hub name of a fine-tuned model or an encoder")
    add("--output", type=expand_home, required=True, help="directory in which the files are written")
    add("--task", help="name of the model's task, for example SQuAD")
    add("--data", type=expand_home, help="directory of official task files")
    add("--vocabulary", type=int, help=kept)
    add("--embedding-bits", type=int, choices=(8, 4), default=8, help=bits)
    add("--web", action="store_true", help="write a page that runs the model in a browser")
    add("--teacher", type=expand_home, help="with --web: fine-tuned teacher, added to the page in int8")
    add("--recipe", type=expand_home, help=recipe)
    add("--labels", help="with --web: names of the classes, comma-separated")
    add("--compared", type=int, help=compared)
    return parser


def _export_files(options: argparse.Namespace) -> int:
    from evaluation.candidates.models import local_directory, require_model
    from evaluation.devices.export_files import finished_export

    with contextlib.ExitStack() as stack:
        model = stack.enter_context(local_directory(options.model))
        require_model(model)
        if options.vocabulary:
            model = _trimmed(options, model, stack)
        summary = finished_export(model, options.output, options.embedding_bits)
        if summary is None:
            storage.require_writable(options.output)
            from evaluation.devices.export import export

            summary = export(model, options.output, options.embedding_bits)
    rows = [[name, f"{size / 1e6:.2f} MB"] for name, size in summary["bytes"].items()]
    print(console.table(rows, ("file", "size")))
    float32, int8 = (summary["difference"][name] for name in ("float32", "int8"))
    print(f"largest difference from torch: float32 {float32:.1e}, int8 {int8:.1e}")
    print(storage.join(options.output, "export.json"))
    return 0


def _export_page(options: argparse.Namespace) -> int:
    from evaluation.web.page_bundle import built_page
    from evaluation.web.site import add_to_site
    from infra.settings.recipe_file import load_recipe

    with contextlib.ExitStack() as stack:
        if options.recipe:
            count = options.compared or SELF_TEST_EXAMPLES
            models = models_of_recipe(load_recipe(options.recipe), options.embedding_bits, count)
        else:
            models = _models_of_directories(options, stack)
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
    from evaluation.candidates.models import local_directory, require_model
    from evaluation.web.site import SiteModel

    task = _catalogue_task(options.task)
    if task and task.kind not in PAGE_KINDS:
        raise UserError(f"--task {task.name}: the page has no form for kind {task.kind!r}; leave --web out")
    directories = {"student": stack.enter_context(local_directory(options.model))}
    if options.teacher:
        directories["teacher"] = stack.enter_context(local_directory(options.teacher))
    for directory in directories.values():
        require_model(directory)
    count = options.compared or SELF_TEST_EXAMPLES
    examples = _texts(task, "dev", options.data)[:count] if options.data else []
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


def models_of_recipe(
    recipe: Recipe, embedding_bits: int = 8, self_test_examples: int = SELF_TEST_EXAMPLES
) -> list[SiteModel]:
    """Returns the students' and the teacher's fine-tuned models that the recipe's evaluation has kept.

    ``embedding_bits``: bits per word-embedding value of the students. ``self_test_examples``: number of dev
    examples per task. Raises UserError if there is no fine-tuned model yet.
    """
    from evaluation.sources.catalogue import find_tasks
    from evaluation.web.site import SiteModel

    settings, models = recipe.evaluation, []
    for task in [task for task in find_tasks(settings.tasks) if task.kind in PAGE_KINDS]:
        examples = _texts(task, "dev", settings.data)[:self_test_examples]
        for role in (*recipe.runs(), "teacher"):
            directory = storage.join(recipe.evaluation_dir, "scores", role, task.name, "model")
            if storage.exists(storage.join(directory, "config.json")):
                model = SiteModel(directory, role, task.name, task.max_length or settings.max_length)
                bits, golden = embedding_bits if role != "teacher" else 8, tuple(examples)
                models.append(replace(model, texts=len(task.texts), golden=golden, embedding_bits=bits))
    if not models:
        raise UserError(f"{recipe.name}: no fine-tuned models for the page yet; evaluate the recipe first")
    return models


def _trimmed(options: argparse.Namespace, directory: str, stack: contextlib.ExitStack) -> str:
    """Returns a temporary copy of the model with the most frequent tokens of the task's training texts.

    The copy exists as long as ``stack`` is open.
    """
    from evaluation.devices.trimming import trim

    target = stack.enter_context(tempfile.TemporaryDirectory())
    texts = (text for row in _texts(_catalogue_task(options.task), "train", options.data) for text in row)
    trim(directory, dict.fromkeys(texts), options.vocabulary, target)
    return target


def _catalogue_task(name: str | None) -> Task | None:
    """Returns the built-in task of this name; None if there is none."""
    from evaluation.sources.catalogue import TASKS, find_task

    return find_task(name) if name and name.lower() in map(str.lower, TASKS) else None


def _texts(task: Task | None, part: str, data: str | None) -> list[tuple[str, ...]]:
    """Returns the examples' texts, for SQuAD (question, context). ``part``: train or dev (the first dev set).

    Raises UserError if there is no built-in task, or if its files are missing or wrong.
    """
    from evaluation.sources.loading import load

    if task is None:
        raise UserError("--data: needs --task with the name of a built-in task, whose files are read")
    split = load(task, part if part == "train" else task.dev_parts[0], data)
    return [(item.question, item.context) for item in split.questions] or list(split.texts)
