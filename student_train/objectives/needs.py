"""The columns of a store that a loss needs, and errors for losses that a store cannot support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from infra.settings.sections import SOFT_TARGETS, StoreNeeds, Train
from infra.settings.sections import TERMS as LOSS_WEIGHTS
from infra.trees import difference
from offline_teacher.stored_teacher import stored_pooling

if TYPE_CHECKING:
    from offline_teacher.store.reader import Store
    from offline_teacher.store.schema import Layout


def taught_layout(train: Train, layout: Layout) -> Layout:
    """The layout of the teacher's outputs for the loss: that of the store, or of a live teacher."""
    if train.teacher == "store":
        return layout
    return replace(
        layout,
        positions="all",
        hidden_states="float16",
        top_k=0,
        temperatures=(),
        replay_layers=max(layout.replay_layers, int(train.alpha_relation > 0)),
    )


def check_store(train: Train, store: Store) -> None:
    """Raises UserError if the store lacks what this loss needs."""
    layout = store.layout
    if train.teacher == "live" and not layout.teacher_weights:
        raise UserError(
            "train.teacher: live runs the whole teacher, whose weights the store does not hold"
            " (store.teacher_weights: false); set train.teacher: store"
        )
    soft_target_kind(train, taught_layout(train, layout))
    if train.alpha_embedding:
        _check_texts(store)


def check_phases(train: Train, stores: Sequence[Store]) -> None:
    """Raises UserError if a store of ``train.phases`` cannot continue what the first store taught."""
    first = stores[0]
    for store in stores[1:]:
        where = f"train.phases: {store.root}"
        for name in ("teacher", "tokenizer", "architecture"):
            if store.fingerprint.get(name) != first.fingerprint.get(name):
                raise UserError(
                    f"{where} was made with another {name} than {first.root};"
                    " run its teacher pass with the same teacher"
                )
        try:
            check_store(train, store)
        except UserError as problem:
            raise UserError(f"{where}: {problem}") from None
        changed = difference(_form(train, first.layout), _form(train, store.layout))
        if changed:
            raise UserError(
                f"{where} holds the teacher's outputs in another form than {first.root}"
                f" ({'; '.join(changed)}); run its teacher pass with the same settings of the store"
            )


def _form(train: Train, layout: Layout) -> dict[str, Any]:
    """What the layouts of all phases must agree in, so that every phase has the same loss."""
    return {
        "vocabulary": layout.vocab_size,
        "hidden size": layout.hidden_size,
        "positions": layout.positions,
        "replay_layers": layout.replay_layers,
        "soft targets": soft_target_kind(train, taught_layout(train, layout)),
    }


def _check_texts(store: Store) -> None:
    """UserError unless every sequence is one text of a sentence encoder, so that it has a vector."""
    if stored_pooling(store) is None:
        raise UserError(
            "train.alpha_embedding: the store's teacher is no sentence encoder, so it makes no vectors of"
            " texts; set train.alpha_embedding: 0"
        )
    recipe = store.fingerprint.get("recipe")
    sequences = recipe.get("sequences") if isinstance(recipe, dict) else None
    packing = sequences.get("packing") if isinstance(sequences, dict) else None
    if store.layout.positions != "pooled" and packing != "document":
        raise UserError(
            "train.alpha_embedding: a sequence of the store is not one text; set train.alpha_embedding: 0 or"
            " run the teacher with sequences.packing: document"
        )


def soft_target_kind(train: Train, layout: Layout) -> str | None:
    """``exact``, ``topk``, or None where alpha_ce is 0. UserError where the store lacks what is needed."""
    if layout.positions == "pooled":
        _check_pooled(train)
        return None
    if train.alpha_embedding and (layout.positions != "all" or layout.hidden_states == "none"):
        raise UserError(
            "train.alpha_embedding: vectors of texts need pooled vectors or hidden states at all positions,"
            " which the store does not hold; set train.alpha_embedding: 0 or run the teacher with"
            " store.positions: all"
        )
    if train.alpha_cos and layout.hidden_states == "none":
        raise UserError(
            "train.alpha_cos: the cosine term needs hidden states, which the store does not hold; "
            "set train.alpha_cos: 0 or run the teacher with store.hidden_states: float16"
        )
    if train.alpha_relation and layout.replay_layers == 0:
        raise UserError(
            "train.alpha_relation: relations need the input of the teacher's top layer, which the store does"
            " not hold; set train.alpha_relation: 0 or run the teacher with store.replay_layers: 1"
        )
    if train.alpha_mlm and layout.masked == 0:
        raise UserError(
            "train.alpha_mlm: the text of the store is not masked; set train.alpha_mlm: 0 or run the teacher"
            " with masking.probability: 0.15"
        )
    if train.kl_positions == "masked" and train.alpha_ce and layout.masked == 0:
        raise UserError("train.kl_positions: masked, but the text of the store is not masked; set it to all")
    if train.kl_positions == "all" and train.alpha_ce and layout.positions == "masked":
        raise UserError(
            "train.kl_positions: all, but the store holds masked positions only; set it to masked "
            "or run the teacher with store.positions: all"
        )
    kind = train.soft_target_kind(layout.hidden_states)
    if kind is not None:
        _check_kind(kind, train, layout)
    return kind


def _check_pooled(train: Train) -> None:
    others = [name for name in LOSS_WEIGHTS if name != "alpha_embedding" and getattr(train, name)]
    if others or not train.alpha_embedding:
        raise UserError(
            f"train.{(others or ['alpha_embedding'])[0]}: the store holds one pooled vector a text: set"
            " train.alpha_embedding: 1 and the other weights of the loss to 0, or run the teacher with"
            " store.positions: all"
        )


def _check_kind(kind: str, train: Train, layout: Layout) -> None:
    needs = SOFT_TARGETS[kind]
    if needs.hidden_states and layout.hidden_states == "none":
        raise UserError(
            f"train.soft_targets: {kind} needs hidden states, which the store does not hold; "
            "set another kind or run the teacher with store.hidden_states: float16"
        )
    if needs.top_k and layout.top_k == 0:
        raise UserError(
            f"train.soft_targets: {kind} needs top-k logits, which the store does not hold; "
            "set another kind or run the teacher with store.top_k: 64"
        )
    if needs.top_k and train.temperature not in layout.temperatures:
        raise UserError(
            f"train.temperature: {train.temperature:g} is not among the store's temperatures "
            f"{list(layout.temperatures)}, which {kind} needs; use one of them or train.soft_targets: exact"
        )


def needs_of(train: Train, layout: Layout) -> StoreNeeds:
    """The parts of a store that the loss reads, for soft targets, cosine, relations and vectors."""
    kind = soft_target_kind(train, layout)
    needs = StoreNeeds() if kind is None else SOFT_TARGETS[kind]
    hidden = needs.hidden_states or max(train.alpha_cos, train.alpha_relation, train.alpha_embedding) > 0
    return replace(needs, hidden_states=hidden)


def columns_needed(train: Train, layout: Layout) -> list[str]:
    """The teacher's columns that the loss reads; a live teacher needs none of them."""
    if train.teacher == "live":
        return []
    needs = needs_of(train, layout)
    if layout.positions == "pooled":
        return ["embedding"]
    names = ["topk_ids", "topk_logits", "logsumexp"] if needs.top_k else []
    if needs.hidden_states:
        names += ["hidden_states", "hidden_scale"] if layout.hidden_states == "int8" else ["hidden_states"]
    return names
