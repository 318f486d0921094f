"""The names of all files of a store."""

from __future__ import annotations

from infra.files import storage

SPEC = "spec.json"
MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
TOKENIZER, TEACHER = "tokenizer", "teacher"
SEQUENCES, SHARDS, TASKS, FAILED = "sequences", "shards", "tasks", "failed"
CONFIG, WEIGHTS, POOLING = "teacher/config.json", "teacher/model.safetensors", "teacher/pooling.json"

TOP = {SPEC, MANIFEST, RECIPE, TOKENIZER, TEACHER, SEQUENCES, SHARDS, TASKS}
"""What lies directly in a finished store."""


def part_name(part: int) -> str:
    """``part-00000``; longer numbers simply grow."""
    return f"part-{part:05d}"


def part_path(root: str, split: str, part: int, end: str) -> str:
    """The file of a part that ends in ``.arrow``, ``.json`` or ``.counts.arrow``."""
    return storage.join(root, SEQUENCES, split, f"{part_name(part)}{end}")


def task_path(root: str, split: str, task: str) -> str:
    """The index of a task."""
    return storage.join(root, TASKS, split, f"{task}.json")


def shard_path(root: str, split: str, task: str, file: str) -> str:
    return storage.join(root, SHARDS, split, task, file)


def failed_path(root: str, split: str, task: str) -> str:
    return storage.join(root, FAILED, split, f"{task}.json")


def repair_command(root: str) -> str:
    """What a message tells the user to run when a store is damaged."""
    return f"python -m offline_teacher.main verify {root} --repair"
