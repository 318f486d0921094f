"""The teacher's top layers and head, from a store alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from offline_teacher.families import family_of
from offline_teacher.store.manifest import CONFIG, WEIGHTS
from offline_teacher.store.reader import Store

if TYPE_CHECKING:
    from offline_teacher.families.replay import Replay

MOST_LAYERS = 256
"""No encoder is deeper; building more of them, as a hostile file may ask for, has no end."""


def stored_top(store: Store) -> Replay | None:
    """The top in float32; None where the teacher has no masked-LM head.

    UserError where configuration and weights, though their digests are right, make no teacher.
    """
    from safetensors.torch import load_file

    from offline_teacher.families.replay import Replay

    config, path = store.teacher_config(), store.teacher_weights()
    _check_sizes(store, config)
    try:
        weights = load_file(path)
        if f"{family_of(config).head.dense}.weight" not in weights:
            return None
        return Replay(config, weights, store.layout.replay_layers)
    except UserError:
        raise
    except Exception as error:  # files of anything at all: transformers and safetensors raise what they like
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{store.root}: {CONFIG} and {WEIGHTS} are no teacher's ({reason})") from None


def _check_sizes(store: Store, config: dict[str, Any]) -> None:
    family = family_of(config)
    depth = config.get(family.own_name("num_hidden_layers"), 0)
    if not isinstance(depth, int) or not 0 <= depth <= MOST_LAYERS:
        raise UserError(
            f"{store.root}: {CONFIG}: num_hidden_layers is {str(depth)[:40]}, not 0 to {MOST_LAYERS}"
        )
    for name in ("hidden_size", "vocab_size"):
        own, stored = config.get(family.own_name(name)), getattr(store.layout, name)
        if own != stored:
            raise UserError(f"{store.root}: {CONFIG}: {name} is {str(own)[:40]}, that of the store {stored}")
