"""Builds the student of a recipe, and the loss that trains it, from a store."""

from __future__ import annotations

import torch

from infra.files import storage
from infra.files.cache import Cache
from infra.settings.recipe import StudentRun
from offline_teacher.inputs.stored_teacher import stored_config, stored_pooling, stored_weights, teacher_of
from offline_teacher.models.replay import Replay
from offline_teacher.models.split import lower_part_from_weights
from offline_teacher.store.store import Store
from student_train.data.loss_needs import teacher_output_layout
from student_train.engine.world import World
from student_train.objectives.freezing import freeze_unreached
from student_train.objectives.objective import Objective
from student_train.student.model import StudentModel, build_student


def model_and_objective(run: StudentRun, store: Store, world: World) -> tuple[StudentModel, Objective]:
    """Returns the model, with unreached parameters frozen, and its objective."""
    train, config, layout = run.train, stored_config(store), teacher_output_layout(run.train, store.layout)
    cache = Cache(train.cache_dir, train.cache_bytes) if storage.is_remote(store.root) else None
    weights = stored_weights(store, config, cache, complete=store.layout.teacher_weights)
    pooling = stored_pooling(store) if train.alpha_embedding else None
    live = None
    with teacher_of(store):
        initial = weights if layout.teacher_weights else None
        model = build_student(run.student, train, config, initial, pooling)
        replay = Replay(config, weights, layout.replay_layers) if layout.hidden_states != "none" else None
        if train.teacher == "live":
            live = lower_part_from_weights(config, weights, layout.replay_layers)
        objective = Objective(train, layout, replay, live, pooling)
        model.flops_per_token = freeze_unreached(model, objective)
    for part in (replay, live):
        if part is not None:
            part.to(world.device, getattr(torch, train.dtype))
    return model, objective
