"""What a store holds and how it is cut into shards: pure arithmetic, specified in FORMAT.md.

Axes: n samples, L length, M masked positions a sequence, P recorded positions a sequence (L or M),
K top-k, T temperatures, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np

FORMAT_VERSION = 1
MAX_COUNT = 2**53
"""No count in a store is larger: beyond it JSON readers disagree about integers."""


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def is_count(value: Any, low: int = 0, high: int = MAX_COUNT) -> bool:
    """True for an integer (not a bool) in [low, high]."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Column:
    """One column of a shard: ``dtype`` and the shape of one sample; an array is [n, *shape]."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def items(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of one sample."""
        return self.items * self.dtype.itemsize


class HasColumns(Protocol):
    """The columns of a shard file, in file order; all that a file's framing depends on."""

    def columns(self) -> dict[str, Column]: ...


@dataclass(frozen=True)
class Layout:
    """The dimensions of a store; in its manifest and in the metadata of every shard.

    Raises ValueError, naming the field, where the dimensions contradict each other.
    """

    length: int
    """L, special tokens included."""
    masked: int
    """M, slots for masked positions in every sequence."""
    vocab_size: int
    """V of the teacher's logits."""
    top_k: int
    """K; 0: neither top-k nor logsumexp."""
    temperatures: tuple[float, ...]
    """T_j at which logsumexp(logits / T_j) is kept; ascending."""
    hidden_size: int
    """D of the teacher, recorded or not."""
    hidden_states: str
    """float16, int8 or none."""
    positions: str
    """all (P = L) or masked (P = M)."""

    def __post_init__(self) -> None:
        require(is_count(self.length, 1, 32767), f"length: must be 1 to 32767, not {self.length!r}")
        require(is_count(self.masked, 1, self.length), f"masked: must be 1 to length, not {self.masked!r}")
        require(
            is_count(self.vocab_size, 2, 2**31), f"vocab_size: must be 2 to 2^31, not {self.vocab_size!r}"
        )
        require(
            is_count(self.top_k, 0, min(self.vocab_size, 65536)),
            f"top_k: must be 0 to vocab_size, not {self.top_k!r}",
        )
        require(
            is_count(self.hidden_size, 1, 2**20), f"hidden_size: must be 1 to 2^20, not {self.hidden_size!r}"
        )
        require(
            self.hidden_states in ("float16", "int8", "none"),
            f"hidden_states: must be float16, int8 or none, not {self.hidden_states!r}",
        )
        require(
            self.positions in ("all", "masked"), f"positions: must be all or masked, not {self.positions!r}"
        )
        require(
            self.top_k > 0 or self.hidden_states != "none",
            "top_k: is 0 and hidden_states is none, so nothing of the teacher would be kept",
        )
        good = isinstance(self.temperatures, tuple) and len(self.temperatures) <= 64
        good = good and all(isinstance(t, float) and 0 < t < math.inf for t in self.temperatures)
        require(
            good and list(self.temperatures) == sorted(set(self.temperatures)),
            f"temperatures: must be positive, ascending and distinct, not {self.temperatures!r}",
        )
        require(
            self.top_k == 0 or len(self.temperatures) > 0,
            "temperatures: at least one is needed where top_k > 0",
        )

    @property
    def recorded(self) -> int:
        """P, recorded positions of a sequence."""
        return self.length if self.positions == "all" else self.masked

    @property
    def id_dtype(self) -> np.dtype:
        """Token ids: uint16 where V <= 65,536, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 65536 else "<u4")

    def columns(self) -> dict[str, Column]:
        """The columns of a shard, in file order."""
        ids, P = self.id_dtype, self.recorded  # noqa: N806
        columns = {
            "sequence_id": Column(np.dtype("<i8"), ()),
            "token_count": Column(np.dtype("<u2"), ()),
            "input_ids": Column(ids, (self.length,)),
            "masked_positions": Column(np.dtype("<i2"), (self.masked,)),
            "masked_labels": Column(ids, (self.masked,)),
        }
        if self.top_k > 0:
            columns["topk_ids"] = Column(ids, (P, self.top_k))
            columns["topk_logits"] = Column(np.dtype("<f2"), (P, self.top_k))
            columns["logsumexp"] = Column(np.dtype("<f4"), (P, len(self.temperatures)))
        if self.hidden_states == "float16":
            columns["hidden_states"] = Column(np.dtype("<f2"), (P, self.hidden_size))
        if self.hidden_states == "int8":
            columns["hidden_states"] = Column(np.dtype("i1"), (P, self.hidden_size))
            columns["hidden_scale"] = Column(np.dtype("<f4"), (P,))
        return columns

    def bytes_per_sample(self) -> int:
        """Bytes of one sample over all columns; a shard file adds 64-byte padding and 2-6 kB of framing."""
        return sum(column.bytes for column in self.columns().values())

    def bytes_per_token(self) -> float:
        """Bytes of a full sequence over its L tokens."""
        return self.bytes_per_sample() / self.length

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "temperatures": list(self.temperatures)}

    @classmethod
    def from_json(cls, value: Any) -> Layout:
        check_keys(value, {field.name for field in fields(cls)}, "layout")
        temperatures = value["temperatures"]
        require(isinstance(temperatures, list), "layout.temperatures: must be a list")
        return cls(**{**value, "temperatures": tuple(temperatures)})


@dataclass(frozen=True)
class ShardPlan:
    """``sequences`` x ``replicas`` samples, cut into shards of consecutive sequences of one replica."""

    sequences: int
    replicas: int
    samples_per_shard: int

    def __post_init__(self) -> None:
        for name in ("sequences", "replicas", "samples_per_shard"):
            value = getattr(self, name)
            require(is_count(value, 1), f"{name}: must be a whole number >= 1, not {value!r}")
        require(self.replicas <= 1000, f"replicas: must be 1 to 1000, not {self.replicas}")

    @property
    def shards_per_replica(self) -> int:
        return -(-self.sequences // self.samples_per_shard)

    @property
    def total(self) -> int:
        """Shards of all replicas."""
        return self.replicas * self.shards_per_replica

    def shard_ids(self) -> Iterator[tuple[int, int]]:
        """(replica, index) of every shard, in the order of the manifest."""
        for replica in range(self.replicas):
            for index in range(self.shards_per_replica):
                yield replica, index

    def sequence_range(self, index: int) -> range:
        """The sequence ids of shard ``index`` of any replica; only the last range may be short."""
        if not 0 <= index < self.shards_per_replica:
            raise IndexError(f"shard index {index} is not below {self.shards_per_replica}")
        start = index * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.sequences))

    def position(self, replica: int, index: int) -> int:
        """Where shard (replica, index) stands in ``shard_ids()``."""
        if not 0 <= replica < self.replicas:
            raise IndexError(f"replica {replica} is not below {self.replicas}")
        self.sequence_range(index)
        return replica * self.shards_per_replica + index

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> ShardPlan:
        check_keys(value, {field.name for field in fields(cls)}, "plan")
        return cls(**value)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens that the sequences use."""

    pad: int
    mask: int
    cls: int
    sep: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(is_count(value, 0, 2**31), f"special.{name}: must be a token id, not {value!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> SpecialIds:
        check_keys(value, {"pad", "mask", "cls", "sep"}, "special")
        return cls(**value)


def shard_name(replica: int, index: int) -> str:
    """``r000-00000000``: replica 0, shard 0. Longer numbers simply grow."""
    return f"r{replica:03d}-{index:08d}"


def check_keys(value: Any, expected: set[str], where: str) -> None:
    """ValueError unless ``value`` is a JSON object with exactly these keys."""
    require(isinstance(value, Mapping), f"{where}: must be an object")
    missing, unknown = sorted(expected - set(value)), sorted(set(value) - expected)
    require(not missing, f"{where}: lacks {', '.join(missing)}")
    require(not unknown, f"{where}: has unknown {', '.join(map(str, unknown))[:200]}")
