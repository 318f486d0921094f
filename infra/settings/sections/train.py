"""``train``: the training of a student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infra.settings.sections import fields
from infra.settings.sections.fields import added, fingerprinted, require, unfingerprinted
from infra.settings.sections.student import Student

TERMS = ("alpha_ce", "alpha_mlm", "alpha_cos", "alpha_relation", "alpha_embedding")
"""Settings that are the weights of the loss's terms."""


@dataclass(frozen=True, kw_only=True)
class StoreNeeds:
    """The columns that a kind of soft target reads from a store."""

    hidden_states: bool = False
    top_k: bool = False
    """Top-k logits, and the logsumexp at the temperature of the loss."""


SOFT_TARGETS = {"exact": StoreNeeds(hidden_states=True), "topk": StoreNeeds(top_k=True)}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """More steps after those on the recipe's own store, for example with longer sequences."""

    store: str = unfingerprinted()
    """Directory or URL of a store of the same teacher, with the teacher's outputs in the same form."""
    steps: int = fingerprinted()
    """Number of optimiser steps of this phase, each with ``batch_size`` sequences."""

    def __post_init__(self) -> None:
        require(self.store != "", "phases: the store of a phase is empty; name a directory or URL")
        require(self.steps >= 1, f"phases: a phase's steps must be >= 1, not {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Training of the student. The default weights of the loss are DistilBERT's (arXiv 1910.01108)."""

    epochs: float = fingerprinted(3.0)
    """Number of passes over the corpus; epoch e reads masking epoch e mod R."""
    max_steps: int | None = fingerprinted(None)
    """Largest number of optimiser steps on the recipe's own store. None: ``epochs`` decides."""
    phases: tuple[Phase, ...] = unfingerprinted(())
    """Phases that follow, each ``{store: PATH, steps: N}``: N steps on another store of the same teacher, for
    example with longer sequences. One learning-rate schedule covers all phases. The steps and the content of
    the stores are fingerprinted, but not their paths."""
    batch_size: int = fingerprinted(256)
    """Sequences per optimiser step, over all ranks and accumulation steps."""
    micro_batch_size: int = unfingerprinted(32)
    """Sequences per forward on one rank."""
    learning_rate: float = fingerprinted(5e-4)
    layer_decay: float = added(1.0)
    """Factor of the learning rate from each layer to the one below it, from the head down to the embeddings.
    Below 1, layers that are copied from the teacher change less the lower they are."""
    betas: tuple[float, float] = fingerprinted((0.9, 0.98))
    eps: float = fingerprinted(1e-6)
    weight_decay: float = fingerprinted(0.0)
    schedule: Literal["linear", "cosine", "constant"] = fingerprinted("linear")
    warmup_ratio: float = fingerprinted(0.05)
    max_grad_norm: float = fingerprinted(5.0)
    temperature: float = fingerprinted(2.0)
    alpha_ce: float = fingerprinted(5.0)
    alpha_mlm: float = fingerprinted(2.0)
    alpha_cos: float = fingerprinted(1.0)
    alpha_relation: float = fingerprinted(0.0)
    """Weight of the relation loss of MiniLMv2 (arXiv 2012.15828); needs ``store.replay_layers`` of 1 or
    more."""
    alpha_embedding: float = fingerprinted(0.0)
    """Weight of the distance between the student's and the teacher's embedding of a text. It needs the store
    of a sentence encoder, with ``positions: pooled`` (then no other term is possible) or
    ``sequences.packing: document``."""
    relation_heads: int | None = fingerprinted(None)
    """Number of relation heads, which must divide the hidden sizes of student and teacher. None: the largest
    common divisor of both, at most 64."""
    relation_weights: tuple[float, float, float] = fingerprinted((1.0, 1.0, 1.0))
    """Relative weights of the query, key and value relations; 0 leaves a relation out."""
    relation_layer: int = fingerprinted(-1)
    """The student's layer whose queries, keys and values are compared; -1: the last layer."""
    relation_teacher_layer: int | None = added(None)
    """The teacher's layer that they are compared with, one of the ``store.replay_layers``: -1 is its last
    layer, -2 the layer below. None: the lowest replayed layer."""
    soft_targets: Literal["auto", "exact", "topk"] = fingerprinted("auto")
    """Form of the teacher's distribution. ``exact``: over the whole vocabulary, computed from hidden states.
    ``topk``: the stored top-k logits. ``auto``: exact if the store has hidden states, else topk."""
    kl_positions: Literal["all", "masked"] = fingerprinted("all")
    """Positions at which the soft targets are compared. ``all``: at every token. ``masked``: at masked tokens
    only, which makes a step cheaper."""
    teacher: Literal["store", "live"] = fingerprinted("store")
    """``store``: the loss uses the stored outputs of the teacher. ``live``: every step runs the whole teacher
    on the store's text, which needs ``store.teacher_weights: true``."""
    dtype: fields.Precision = fingerprinted("bfloat16")
    zero_stage: Literal[0, 1, 2] = unfingerprinted(0)
    deepspeed_config: str | None = unfingerprinted(None)
    """A DeepSpeed JSON file that is merged with the recipe; a key with different values in both is an
    error."""
    seed: int = fingerprinted(0)
    window_batches: int = fingerprinted(64)
    """Size of the shuffle window in batches. Each window takes random blocks from the whole corpus."""
    prefetch: int = unfingerprinted(4)
    """Number of micro-batches that are decoded ahead."""
    compile: bool = unfingerprinted(True)
    """Fuse the elementwise part of the loss with torch.compile. If that fails, the loss runs uncompiled, with
    a warning."""
    deterministic: bool = unfingerprinted(False)
    """Use torch's deterministic algorithms. On a GPU they are slower, but make a resumed run bit-equal to an
    uninterrupted run. On a CPU runs are bit-equal without them."""
    profile_steps: int = unfingerprinted(0)
    """Number of steps that rank 0 profiles, after the first ten steps. The result is ``trace.json`` beside
    the history."""
    log_every: int = unfingerprinted(10)
    """Steps between two lines of the training history."""
    validate_every: int = unfingerprinted(0)
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = unfingerprinted(0)
    """Steps between two checkpoints; 0: only ``checkpoint_minutes`` counts."""
    checkpoint_minutes: float = unfingerprinted(5.0)
    """Minutes between two checkpoints; 0: only ``checkpoint_every`` counts."""
    keep_checkpoints: int = unfingerprinted(2)
    cache_dir: str | None = unfingerprinted(None)
    """Directory in which all ranks of a node cache blocks of a remote store. None: a temporary directory."""
    cache_bytes: int = unfingerprinted(20 << 30)
    """Largest size of the cache in bytes."""

    def __post_init__(self) -> None:
        at_least_1 = ("batch_size", "micro_batch_size", "window_batches", "prefetch", "log_every")
        fields.check_at_least(self, 1, *at_least_1, "max_steps", "keep_checkpoints")
        at_least_0 = ("weight_decay", "max_grad_norm", "validate_every", "checkpoint_every", "profile_steps")
        fields.check_at_least(self, 0, *TERMS, *at_least_0, "checkpoint_minutes", "cache_bytes")
        fields.check_positive(self, "epochs", "learning_rate", "eps")
        valid = fields.is_temperature(self.temperature)
        require(valid, f"temperature: must be {fields.TEMPERATURE_RANGE}, not {self.temperature}")
        require(0 <= self.seed < 2**63, f"seed: must be >= 0 and below 2^63, not {self.seed}")
        require(0 <= self.warmup_ratio < 1, f"warmup_ratio: must be in [0, 1), not {self.warmup_ratio}")
        require(0 < self.layer_decay <= 1, f"layer_decay: must be in (0, 1], not {self.layer_decay}")
        betas, weights = list(self.betas), list(self.relation_weights)
        require(min(betas) >= 0 and max(betas) < 1, f"betas: must be in [0, 1), not {betas}")
        has_loss = any(getattr(self, name) > 0 for name in TERMS)
        require(has_loss, f"{', '.join(TERMS)} are all zero: there is no loss; set one of them above 0")
        valid = min(weights) >= 0 and max(weights) > 0
        require(valid, f"relation_weights: must be >= 0 and not all 0, not {weights}")
        require(
            self.teacher == "store" or self.soft_targets != "topk",
            "soft_targets: topk needs stored logits, but teacher: live computes exact soft targets; set"
            " soft_targets: exact",
        )
        batch, micro = self.batch_size, self.micro_batch_size
        message = f"batch_size: {batch} is not a multiple of micro_batch_size = {micro}; change one"
        require(batch % micro == 0, message)

    def soft_target_kind(self, hidden_states: str) -> str | None:
        """Returns exact or topk for a store with this ``hidden_states`` setting; None if alpha_ce is 0."""
        if not self.alpha_ce:
            return None
        if self.soft_targets == "auto":
            return "exact" if hidden_states != "none" else "topk"
        return self.soft_targets


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The settings of one of several students of a recipe."""

    student: Student
    train: Train
