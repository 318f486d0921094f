"""Reads a store's teacher. Its files are not trusted, so they are checked before a model is built from them.

A digest shows that a file is as it was written, not that it holds a valid teacher. Where files do not make a
teacher, functions here raise UserError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.errors import UserError, first_line
from infra.files.cache import Cache
from offline_teacher.families import family_of
from offline_teacher.families.positions import usable_length
from offline_teacher.models.pooling import MODES, Pooling
from offline_teacher.store.blocks import hidden_values
from offline_teacher.store.paths import CONFIG, POOLING, WEIGHTS
from offline_teacher.store.schema import Layout
from offline_teacher.store.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from offline_teacher.models.replay import Replay

MOST_LAYERS = 256
"""Largest number of layers accepted. A hostile file could ask for more than can ever be built."""
AGAIN = "make the store again from a sound teacher"


@contextmanager
def teacher_of(store: Store) -> Iterator[None]:
    """Turns any exception while a teacher is built from a store's files into a UserError that names them."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise many kinds for invalid files
        raise UserError(
            f"{store.root}: {CONFIG} and {WEIGHTS} do not make a teacher ({first_line(error)}); {AGAIN}"
        ) from error


def stored_config(store: Store) -> dict[str, Any]:
    """The teacher's configuration. Raises UserError if its sizes differ from those of the store."""
    config, where = store.teacher_config(), f"{store.root}: {CONFIG}"
    with teacher_of(store):
        family = family_of(config)
        depth = config.get(family.own_name("num_hidden_layers"), 0)
        if not isinstance(depth, int) or not 0 <= depth <= MOST_LAYERS:
            raise UserError(f"{where}: num_hidden_layers is {str(depth)[:40]}, not 0 to {MOST_LAYERS}")
        for name in ("hidden_size", "vocab_size"):
            own, stored = config.get(family.own_name(name)), getattr(store.layout, name)
            if own != stored:
                raise UserError(f"{where}: {name} is {str(own)[:40]}, that of the store {stored}")
        heads, width = config.get(family.own_name("num_attention_heads")), store.layout.hidden_size
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise UserError(f"{where}: {str(heads)[:40]} attention heads do not divide {width}")
        longest, length = usable_length(family.config(config)), store.layout.length
        if longest < length:
            raise UserError(f"{where}: it places {longest} tokens, sequences of the store have {length}")
    return config


def stored_weights(
    store: Store, config: dict[str, Any], cache: Cache | None = None, complete: bool = False
) -> dict[str, Tensor]:
    """The teacher's tensors by name, all finite and of the shapes in ``config``. ``cache``: for a remote
    store. ``complete``: require all tensors of the model; otherwise the caller checks those that it needs."""
    from safetensors.torch import load_file

    from offline_teacher.models.weights import filled

    with teacher_of(store):
        weights = load_file(store.teacher_weights(cache))
        try:
            _, missing = filled(config, weights)
        except UserError as error:
            raise UserError(f"{store.root}: {CONFIG} and {WEIGHTS}: {error}; {AGAIN}") from None
        if complete and missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(f"{store.root}: {WEIGHTS} lacks {', '.join(missing[:3])}{more}; {AGAIN}")
        for name, tensor in weights.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{store.root}: {WEIGHTS}: {name} holds a number that is not finite; {AGAIN}")
    return weights


def stored_top(store: Store) -> Replay | None:
    """The teacher's top layers and head in float32; None where it has no masked-LM head."""
    from offline_teacher.models.replay import Replay

    config = stored_config(store)
    weights = stored_weights(store, config)
    if f"{family_of(config).head.dense}.weight" not in weights:
        return None
    with teacher_of(store):
        return Replay(config, weights, store.layout.replay_layers)


def decoder_input(
    layout: Layout, top: Replay, columns: Mapping[str, np.ndarray], rows: np.ndarray, slots: np.ndarray
) -> Tensor:
    """z float32 [N, E] at recorded ``slots`` [N] of samples ``rows`` [N], from stored hidden states. Logits
    are z @ top.decoder_weight.T + top.decoder_bias."""
    import torch

    hidden = torch.from_numpy(hidden_values(layout, columns))
    last = top.last_hidden(hidden, torch.from_numpy(columns["token_count"].astype(np.int64)))
    return top.decoder_input(last[torch.from_numpy(rows), torch.from_numpy(slots)])


def stored_pooling(store: Store) -> Pooling | None:
    """The teacher's pooling; None if it is not a sentence encoder."""
    told = store.pooling()
    if told is None:
        return None
    try:
        pooling = Pooling(**{field.name: told[field.name] for field in fields(Pooling)})
        if pooling.mode not in MODES.values() or not isinstance(pooling.normalise, bool):
            raise ValueError(f"it pools by {str(pooling.mode)[:40]!r}")
    except (KeyError, ValueError) as error:
        raise UserError(f"{store.root}: {POOLING} is no valid pooling ({error}); {AGAIN}") from None
    return pooling
