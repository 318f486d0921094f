"""The teacher's top layers and head, from a store alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offline_teacher.families import family_of
from offline_teacher.store.reader import Store
from offline_teacher.stored_teacher import stored_config, stored_weights, teacher_of

if TYPE_CHECKING:
    from offline_teacher.models.replay import Replay


def stored_top(store: Store) -> Replay | None:
    """The top in float32; None where the teacher has no masked-LM head.

    UserError where configuration and weights, though their digests are right, make no teacher.
    """
    from offline_teacher.models.replay import Replay

    config = stored_config(store)
    weights = stored_weights(store, config)
    if f"{family_of(config).head.dense}.weight" not in weights:
        return None
    with teacher_of(store):
        return Replay(config, weights, store.layout.replay_layers)
