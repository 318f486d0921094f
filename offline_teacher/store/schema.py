"""What a store holds and how it is cut: pure arithmetic, specified in FORMAT.md.

Axes: n samples, L length, M masked positions a sequence, P recorded positions a sequence, K top-k,
T temperatures, V vocabulary, D hidden size, C columns without ``digests``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
FORMAT_VERSION = 2
SPLITS = ("train", "validation")
DIGESTS = "digests"
Columns = dict[str, np.ndarray]
"""Column -> array [n, *shape]."""
MAX_COUNT = 2**53
"""No count in a store is larger: beyond it JSON readers disagree about integers."""

BLOCK_BYTES = 4 << 20
READ_BYTES = 1 << 20
"""Least size of a range request: an object store's latency weighs more in smaller ones."""
SHARD_BYTES = 256 << 20


def require(condition: bool, sentence: str) -> None:
    """ValueError with this sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def is_count(value: Any, low: int = 0, high: int = MAX_COUNT) -> bool:
    """True for an integer (not a bool) in [low, high]."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_keys(value: Any, expected: set[str], where: str) -> None:
    """ValueError unless ``value`` is a JSON object with exactly these keys."""
    require(isinstance(value, Mapping), f"{where}: must be an object")
    missing, unknown = sorted(expected - set(value)), sorted(set(value) - expected)
    require(not missing, f"{where}: lacks {', '.join(missing)}")
    require(not unknown, f"{where}: has unknown {', '.join(map(str, unknown))[:200]}")


def parsed(kind: type[T], value: Any, where: str) -> T:
    """A dataclass from a JSON object with exactly its fields; lists become tuples. ValueError otherwise."""
    check_keys(value, {field.name for field in fields(kind)}, where)  # type: ignore[arg-type]
    return kind(**{name: tuple(item) if isinstance(item, list) else item for name, item in value.items()})


@dataclass(frozen=True)
class Column:
    """One column of a shard: ``dtype`` and the shape of one sample; an array is [n, *shape]."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def items(self) -> int:
        """Values of one sample."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of one sample."""
        return self.items * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The dimensions of a store, a member of spec.json.

    Raises ValueError, which names the field, if the dimensions contradict each other.
    """

    length: int
    """L, special tokens included."""
    masked: int
    """M, slots for masked positions in every sequence; 0: masking is off."""
    vocab_size: int
    """V of the teacher's logits."""
    hidden_size: int
    """D of the teacher, recorded or not."""
    top_k: int
    """K; 0: neither top-k nor logsumexp."""
    temperatures: tuple[float, ...]
    """T_j at which logsumexp(logits / T_j) is kept; ascending."""
    hidden_states: str
    """float16, bfloat16, int8 or none."""
    positions: str
    """all (P = L), masked (P = M) or pooled (one vector a sequence)."""
    replay_layers: int = 0
    """n: the hidden states are the input of the teacher's top n layers; 0: the output of the last layer."""
    teacher_weights: bool = True
    """False: the store holds only those of the teacher's weights that replay needs."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_temperatures()
        self._check_combinations()

    def _check_numbers(self) -> None:
        ranges = {
            "length": (1, 32767),
            "masked": (0, self.length),
            "vocab_size": (2, 2**31),
            "hidden_size": (1, 2**20),
            "top_k": (0, 65536),
            "replay_layers": (0, 1000),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            require(is_count(value, low, high), f"{name}: must be {low} to {high}, not {value!r}")
        require(self.top_k <= self.vocab_size, f"top_k: must be 0 to vocab_size, not {self.top_k}")
        for name, choices in (
            ("hidden_states", ("float16", "bfloat16", "int8", "none")),
            ("positions", ("all", "masked", "pooled")),
        ):
            value = getattr(self, name)
            require(value in choices, f"{name}: must be {', '.join(choices)}, not {str(value)[:40]!r}")
        require(isinstance(self.teacher_weights, bool), "teacher_weights: must be true or false")

    def _check_temperatures(self) -> None:
        good = isinstance(self.temperatures, tuple) and len(self.temperatures) <= 64
        good = good and all(isinstance(t, float) and 0 < t < math.inf for t in self.temperatures)
        require(
            good and list(self.temperatures) == sorted(set(self.temperatures)),
            f"temperatures: must be positive, ascending and distinct, not {str(self.temperatures)[:200]}",
        )
        require(self.top_k == 0 or len(self.temperatures) > 0, "temperatures: top_k > 0 needs at least one")

    def _check_combinations(self) -> None:
        if self.positions == "pooled":
            require(self.top_k == 0, "top_k: must be 0 with positions pooled")
            require(self.hidden_states == "none", "hidden_states: must be none with positions pooled")
        else:
            require(
                self.top_k > 0 or self.hidden_states != "none",
                "top_k: is 0 and hidden_states is none, so nothing of the teacher would be kept",
            )
        require(self.positions != "masked" or self.masked > 0, "positions: masked needs masked positions")
        require(
            self.replay_layers == 0 or (self.positions == "all" and self.hidden_states != "none"),
            "replay_layers: needs hidden states at all positions",
        )

    @property
    def recorded(self) -> int:
        """P, recorded positions of a sequence; 0 if a sequence has one pooled vector."""
        return {"all": self.length, "masked": self.masked, "pooled": 0}[self.positions]

    @property
    def id_dtype(self) -> np.dtype:
        """Token ids: uint16 where V <= 65,536, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 65536 else "<u4")

    def columns(self) -> dict[str, Column]:
        """The columns of a shard, ``digests`` among them, in file order.

        Targets over the vocabulary stand before the text and hidden states behind it, so that text and
        either of them are one range of bytes.
        """
        data = {**self._vocabulary_columns(), **self._text_columns(), **self._hidden_columns()}
        digests = {DIGESTS: Column(np.dtype("<u8"), (len(data),))}
        return {**self._vocabulary_columns(), **digests, **self._text_columns(), **self._hidden_columns()}

    def used_slots(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """bool [n, P]: recorded positions that have a token; at all others every value is zero."""
        if self.positions == "masked":
            return np.asarray(columns["masked_positions"] >= 0)
        return np.arange(self.length) < columns["token_count"][:, None]

    def _vocabulary_columns(self) -> dict[str, Column]:
        P = self.recorded  # noqa: N806
        if self.top_k == 0:
            return {}
        return {
            "topk_ids": Column(self.id_dtype, (P, self.top_k)),
            "topk_logits": Column(np.dtype("<f2"), (P, self.top_k)),
            "logsumexp": Column(np.dtype("<f4"), (P, len(self.temperatures))),
        }

    def _text_columns(self) -> dict[str, Column]:
        columns = {
            "sequence_id": Column(np.dtype("<i8"), ()),
            "token_count": Column(np.dtype("<u2"), ()),
            "input_ids": Column(self.id_dtype, (self.length,)),
        }
        if self.masked:
            columns["masked_positions"] = Column(np.dtype("<i2"), (self.masked,))
            columns["masked_labels"] = Column(self.id_dtype, (self.masked,))
        return columns

    def _hidden_columns(self) -> dict[str, Column]:
        P, D = self.recorded, self.hidden_size  # noqa: N806
        if self.positions == "pooled":
            return {"embedding": Column(np.dtype("<f2"), (D,))}
        if self.hidden_states == "none":
            return {}
        dtype = {"float16": "<f2", "bfloat16": "<u2", "int8": "i1"}[self.hidden_states]
        columns = {"hidden_states": Column(np.dtype(dtype), (P, D))}
        if self.hidden_states == "int8":
            columns["hidden_scale"] = Column(np.dtype("<f4"), (P,))
        return columns

    def data_columns(self) -> dict[str, Column]:
        """The C columns without ``digests``: what a writer is given, and the order of the digests."""
        return {name: column for name, column in self.columns().items() if name != DIGESTS}

    def bytes_per_sample(self) -> int:
        """Bytes of one sample over all columns, by FORMAT.md, "Bytes"; framing comes on top."""
        return sum(column.bytes for column in self.columns().values())

    def smallest_read(self) -> int:
        """Least bytes that a student reads of one sample: text and either top-k or hidden states."""
        kinds = [kind for kind in (self._vocabulary_columns(), self._hidden_columns()) if kind]
        sizes = [sum(column.bytes for column in kind.values()) for kind in kinds]
        return sum(column.bytes for column in self._text_columns().values()) + min(sizes, default=0)

    def bytes_per_token(self) -> float:
        """Bytes of a full sequence over its L tokens."""
        return self.bytes_per_sample() / self.length


@dataclass(frozen=True)
class Plan:
    """How the samples of a store are cut into tasks, shards and blocks."""

    masking_epochs: int
    """R: how many times each training sequence is masked. The validation split has one masking epoch."""
    task_sequences: int
    """Rows of a task; the last task of a part may have fewer."""
    block_samples: int
    """Samples of a block; the last block of a task may have fewer."""
    shard_blocks: int
    """Blocks of a shard; the last shard of a task may have fewer."""

    def __post_init__(self) -> None:
        highest = {"masking_epochs": 10**6, "task_sequences": 2**32, "block_samples": 2**24}
        for name, value in asdict(self).items():
            high = highest.get(name, 2**24)
            require(is_count(value, 1, high), f"{name}: must be 1 to {high}, not {str(value)[:40]}")

    @classmethod
    def from_bytes(
        cls,
        layout: Layout,
        masking_epochs: int,
        task_sequences: int,
        block_bytes: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> Plan:
        """The plan whose blocks and shards come closest to these sizes from below.

        A block has at least one sample and no more than a task; a shard has at least one block.
        ``block_bytes`` None: ``BLOCK_BYTES``, or more where the smallest read of a block would otherwise have
        less than ``READ_BYTES``.
        """
        samples = (block_bytes or BLOCK_BYTES) // layout.bytes_per_sample()
        if block_bytes is None:
            samples = max(samples, -(-READ_BYTES // layout.smallest_read()))
        block_samples = max(1, min(samples, task_sequences, shard_bytes // layout.bytes_per_sample()))
        shard_blocks = max(1, shard_bytes // (block_samples * layout.bytes_per_sample()))
        return cls(masking_epochs, task_sequences, block_samples, min(shard_blocks, 2**24))

    def epochs(self, split: str) -> int:
        """Masking epochs of a split: R for ``train``, one for ``validation``."""
        return self.masking_epochs if split == "train" else 1


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens that the sequences use."""

    pad: int
    cls: int
    sep: int
    mask: int | None
    """None only if masking is off and the tokenizer has no mask token."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            absent = name == "mask" and value is None
            require(absent or is_count(value, 0, 2**31), f"special.{name}: must be a token id")
