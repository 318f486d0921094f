"""Makes the reference ``start``: a student before its training, initialised from the teacher's layers."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack

from evaluation.candidates.models import copy_files, local_directory
from infra.files import storage
from infra.settings.recipe import StudentRun, fingerprinted_settings
from offline_teacher.store.store import Store

SOURCE = "start.json"
"""Name of the file that says from what a start was made. It is written last, so its directory is complete."""


def start_key(run: StudentRun) -> str:
    """Returns a key that is equal for students that start from the same weights."""
    return json.dumps(fingerprinted_settings(run.student), sort_keys=True)


def start_of(run: StudentRun, store: Store, directory: str, stack: ExitStack) -> str:
    """Returns a local model directory with the student's initial weights, made in ``directory`` if necessary.

    The store must hold all of the teacher's weights, and ``student.init`` must be ``teacher``. Raises
    UserError if the store's teacher is damaged or does not fit the student.
    """
    source = {"store": store.digest, "student": fingerprinted_settings(run.student)}
    marker = storage.join(directory, SOURCE)
    if storage.read_object(marker) != source:
        _build(run, store, directory)
        storage.publish_json(marker, source)
    return stack.enter_context(local_directory(directory))


def _build(run: StudentRun, store: Store, directory: str) -> None:
    from infra.files.cache import Cache
    from offline_teacher.inputs.stored_teacher import stored_config, stored_weights, teacher_of
    from offline_teacher.models.slicing import starting_weights
    from offline_teacher.models.students import new_student, planned_student
    from offline_teacher.store.store import CACHE_BYTES

    teacher = stored_config(store)
    with tempfile.TemporaryDirectory() as draft, teacher_of(store):
        cache = Cache(storage.join(draft, ".cache"), CACHE_BYTES)
        weights = stored_weights(store, teacher, cache, complete=True)
        layers, config = planned_student(run.student, teacher)
        start = starting_weights(config, teacher, weights, layers)
        model = new_student(config, start, head=False)
        model.save_pretrained(storage.join(draft, "model"))
        for name, data in store.tokenizer_files().items():
            storage.publish_bytes(storage.join(draft, "model", name), data)
        storage.remove_tree(directory)
        copy_files(storage.join(draft, "model"), directory)
