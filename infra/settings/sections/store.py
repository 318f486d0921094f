"""``store``: which outputs of the teacher are stored, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infra.settings.sections import fields
from infra.settings.sections.fields import fingerprinted, require, unfingerprinted


@dataclass(frozen=True, kw_only=True)
class Store:
    """Location of the store, and its content per sample. Students and evaluation only read ``path``."""

    path: str | None = unfingerprinted(None)
    """Directory or URL of the store; None: ``<output>/<name>/store``."""
    replay_layers: int = fingerprinted(0)
    """n: the store keeps the hidden states that enter the teacher's top n encoder layers, and training runs
    these layers again. 0: the store keeps the output of the last layer."""
    hidden_states: Literal["float16", "bfloat16", "int8", "none"] = fingerprinted("float16")
    """Number format of the stored hidden states; ``none``: they are not stored."""
    positions: Literal["all", "masked", "pooled"] = fingerprinted("all")
    """Positions whose outputs are stored. ``pooled``: only the sentence encoder's embedding of each
    sequence."""
    top_k: int = fingerprinted(64)
    """K: number of largest logits stored per position. 0: neither logits nor logsumexp are stored."""
    temperatures: tuple[float, ...] = fingerprinted((1.0, 2.0))
    """Temperatures T, ascending, at which logsumexp(logits / T) is stored."""
    teacher_weights: bool = fingerprinted(True)
    """true: the store contains all weights of the teacher. false: only the weights that replay needs, for
    teachers that may not be redistributed; students can then not start from the teacher's layers."""
    task_sequences: int = fingerprinted(4096)
    """Sequences per task, the unit of work, retry and commit."""
    block_bytes: int | None = fingerprinted(None)
    """Bytes per block, the unit of range requests and of shuffling. None: 4 MiB, or more if a block's top-k
    or hidden states, whichever are smaller, would otherwise have less than 1 MiB."""
    shard_bytes: int = fingerprinted(256 << 20)
    """Largest number of bytes of one file."""

    def __post_init__(self) -> None:
        require(0 <= self.top_k <= 1024, f"top_k: must be 0 to 1024, not {self.top_k}")
        replayed, temperatures = self.replay_layers, list(self.temperatures)
        require(0 <= replayed <= 1000, f"replay_layers: must be 0 or more, not {replayed}")
        allowed = f"must be {fields.TEMPERATURE_RANGE}, ascending and distinct"
        valid = all(map(fields.is_temperature, temperatures)) and temperatures == sorted(set(temperatures))
        require(valid, f"temperatures: {allowed}, not {temperatures}")
        require(self.top_k == 0 or 1.0 in self.temperatures, "temperatures: must contain 1.0 if top_k > 0")
        count = self.task_sequences
        require(1 <= count <= 1 << 24, f"task_sequences: must be >= 1, not {count}")
        fields.check_at_least(self, 1, "block_bytes", "shard_bytes")
        shard, block = self.shard_bytes, self.block_bytes
        require(shard >= (block or 1), f"shard_bytes: {shard} is less than block_bytes = {block}; raise it")
        if self.positions == "pooled":
            require(
                self.top_k == 0 and self.replay_layers == 0,
                "positions: pooled keeps one vector per sequence; set top_k: 0 and replay_layers: 0",
            )
            require(
                self.hidden_states in ("float16", "none"),
                "hidden_states: a pooled vector is kept in float16; leave it out with positions: pooled",
            )
            return
        require(
            self.top_k > 0 or self.hidden_states != "none",
            "top_k: 0 and hidden_states: none would leave the store without outputs of the teacher;"
            " change one of them",
        )
        require(
            self.replay_layers == 0 or (self.positions == "all" and self.hidden_states != "none"),
            "replay_layers: the top layers can only be replayed from hidden states at all positions; set"
            " positions: all and hidden_states: float16",
        )
