"""Names of the files and directories of a store."""

from __future__ import annotations

from infra.files import storage

SPEC = "spec.json"
MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
TOKENIZER, TEACHER = "tokenizer", "teacher"
SEQUENCES, SHARDS, TASKS, FAILED = "sequences", "shards", "tasks", "failed"
CONFIG, WEIGHTS, POOLING = "teacher/config.json", "teacher/model.safetensors", "teacher/pooling.json"

TOP = {SPEC, MANIFEST, RECIPE, TOKENIZER, TEACHER, SEQUENCES, SHARDS, TASKS}
"""Names of the files and directories at the top of a finished store."""


def part_name(part: int) -> str:
    """Returns the name of a part, with at least five digits: ``part-00000``."""
    return f"part-{part:05d}"


def part_path(root: str, split: str, part: int, ending: str) -> str:
    """Returns the path of a part's file. ``ending``: ``.arrow``, ``.json`` or ``.counts.arrow``."""
    return storage.join(root, SEQUENCES, split, f"{part_name(part)}{ending}")


def task_path(root: str, split: str, task: str) -> str:
    """Returns the path of a task's index."""
    return storage.join(root, TASKS, split, f"{task}.json")


def shard_path(root: str, split: str, task: str, file: str) -> str:
    return storage.join(root, SHARDS, split, task, file)


def failed_path(root: str, split: str, task: str) -> str:
    return storage.join(root, FAILED, split, f"{task}.json")


def repair_command(root: str) -> str:
    """Returns the command that a user should run if a store is damaged."""
    return f"python -m offline_teacher.main verify {root} --repair"
