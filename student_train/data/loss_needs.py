"""What a loss needs: columns of a store, a head of the student, relation heads that fit both models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from infra.settings.recipe import unmet_needs
from infra.settings.sections import SOFT_TARGETS, StoreNeeds, Train
from infra.settings.sections import TERMS as LOSS_WEIGHTS
from infra.trees import difference
from offline_teacher.inputs.stored_teacher import stored_pooling

MAX_RELATION_HEADS = 64
"""Largest number of relation heads that is chosen by default."""

if TYPE_CHECKING:
    from offline_teacher.store.schema import Layout
    from offline_teacher.store.store import Store


def teacher_output_layout(train: Train, store_layout: Layout) -> Layout:
    """Returns the layout of the teacher's outputs that the loss reads: the store's, or a live teacher's,
    which computes float16 hidden states at all positions and no top-k logits."""
    if train.teacher == "store":
        return store_layout
    replayed = max(store_layout.replay_layers, int(train.alpha_relation > 0))
    computed: dict[str, Any] = {"positions": "all", "hidden_states": "float16", "replay_layers": replayed}
    return replace(store_layout, top_k=0, temperatures=(), **computed)


def check_store(train: Train, store: Store) -> None:
    """Raises UserError if the store lacks what the loss of ``train`` needs."""
    checked_soft_target_kind(train, teacher_output_layout(train, store.layout))
    if train.alpha_embedding:
        _check_one_text_per_sequence(store)


def check_phases(train: Train, stores: Sequence[Store]) -> None:
    """Raises UserError unless all stores have the same teacher, tokenizer and architecture, and hold the
    teacher's outputs in the same form. ``stores``: the recipe's own, then those of ``train.phases``."""
    first = stores[0]
    for store in stores[1:]:
        where = f"train.phases: {store.root}"
        for name in ("teacher", "tokenizer", "architecture"):
            if store.fingerprint.get(name) != first.fingerprint.get(name):
                remedy = "run its teacher pass with the same teacher"
                raise UserError(f"{where} was made with another {name} than {first.root}; {remedy}")
        try:
            check_store(train, store)
        except UserError as problem:
            raise UserError(f"{where}: {problem}") from None
        changed = difference(_loss_inputs(train, first.layout), _loss_inputs(train, store.layout))
        if changed:
            raise UserError(
                f"{where} holds the teacher's outputs in another form than {first.root}"
                f" ({'; '.join(changed)}); run its teacher pass with the same store settings"
            )


def _loss_inputs(train: Train, layout: Layout) -> dict[str, Any]:
    """Returns the properties of a store that decide which loss is computed; all phases must agree in them."""
    return {
        "vocabulary": layout.vocab_size,
        "hidden size": layout.hidden_size,
        "positions": layout.positions,
        "replay_layers": layout.replay_layers,
        "soft targets": checked_soft_target_kind(train, teacher_output_layout(train, layout)),
    }


def _check_one_text_per_sequence(store: Store) -> None:
    """Raises UserError unless every sequence is one text and the teacher is a sentence encoder. Otherwise the
    embedding term of the loss has no text embedding to compare."""
    if stored_pooling(store) is None:
        raise UserError(
            "train.alpha_embedding: the store's teacher is not a sentence encoder, so it makes no embeddings"
            " of texts; set train.alpha_embedding: 0"
        )
    recipe = store.fingerprint.get("recipe")
    sequences = recipe.get("sequences") if isinstance(recipe, dict) else None
    packing = sequences.get("packing") if isinstance(sequences, dict) else None
    if store.layout.positions != "pooled" and packing != "document":
        raise UserError(
            "train.alpha_embedding: a sequence of the store is not one text; set train.alpha_embedding: 0 or"
            " run the teacher with sequences.packing: document"
        )


def checked_soft_target_kind(train: Train, layout: Layout) -> str | None:
    """Returns the kind of soft target, ``exact`` or ``topk``; None if ``train.alpha_ce`` is 0. ``layout``:
    see `teacher_output_layout`. Raises UserError if the layout lacks what a term of the loss needs."""
    if layout.positions == "pooled":  # the store has no other outputs
        others = [name for name in LOSS_WEIGHTS if name != "alpha_embedding" and getattr(train, name)]
        if others or not train.alpha_embedding:
            raise UserError(
                f"train.{(others or ['alpha_embedding'])[0]}: the store holds one pooled embedding per text;"
                " set train.alpha_embedding: 1 and the other weights of the loss to 0, or run the teacher"
                " with store.positions: all"
            )
        return None
    for problem in unmet_needs(train, layout, has_masks=layout.masked > 0):
        raise UserError(f"train.{problem}")
    return train.soft_target_kind(layout.hidden_states)


def required_columns(train: Train, store_layout: Layout) -> list[str]:
    """Returns the names of the teacher's columns that the loss reads; a live teacher needs no column."""
    if train.teacher == "live":
        return []
    kind = checked_soft_target_kind(train, store_layout)
    if store_layout.positions == "pooled":
        return ["embedding"]
    needs = StoreNeeds() if kind is None else SOFT_TARGETS[kind]
    names = ["topk_ids", "topk_logits", "logsumexp"] if needs.top_k else []
    if needs.hidden_states or max(train.alpha_cos, train.alpha_relation, train.alpha_embedding) > 0:
        names += ["hidden_states"] + ["hidden_scale"] * (store_layout.hidden_states == "int8")
    return names


def needs_head(train: Train) -> bool:
    """Whether the loss has a term over the vocabulary, so that the student needs a masked-LM head."""
    return train.alpha_ce > 0 or train.alpha_mlm > 0


def relation_heads(teacher_width: int, student_width: int, requested: int | None = None) -> int:
    """Returns the number of relation heads: ``requested``, or else the largest common divisor of both widths
    that is at most 64. Raises UserError if ``requested`` does not divide both widths."""
    common = math.gcd(teacher_width, student_width)
    if requested is None:
        return max(n for n in range(1, MAX_RELATION_HEADS + 1) if common % n == 0)
    if requested < 1 or common % requested:
        raise UserError(
            f"train.relation_heads: {requested} does not divide both the teacher's width {teacher_width} and"
            f" the student's {student_width}; choose a divisor of {common}, or leave the setting out"
        )
    return requested
