"""Columns of a store, and sizes of its blocks, shards and tasks. Pure arithmetic, specified in FORMAT.md.

Axes: n samples, L length, M slots for masked positions per sequence, P recorded positions per sequence,
K top-k, T temperatures, V vocabulary, D hidden size, C columns without ``digests``.
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
"""Name of a column -> array [n, *shape]."""
MAX_COUNT = 2**53
"""Largest count in a store. JSON readers that use float64 cannot represent all larger integers."""

BLOCK_BYTES = 4 << 20
"""Default size of a block."""
MIN_READ_BYTES = 1 << 20
"""Minimum number of bytes of a range request; smaller requests mostly wait for the object store's latency."""
SHARD_BYTES = 256 << 20
"""Default size of a shard."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def is_count(value: Any, low: int = 0, high: int = MAX_COUNT) -> bool:
    """Whether ``value`` is an integer (not a bool) in [low, high]."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_keys(value: Any, expected: set[str], where: str) -> None:
    """Raises ValueError unless ``value`` is a JSON object with exactly these keys. ``where``: its name."""
    require(isinstance(value, Mapping), f"{where}: must be an object")
    missing, unknown = sorted(expected - set(value)), sorted(set(value) - expected)
    require(not missing, f"{where}: lacks {', '.join(missing)}")
    require(not unknown, f"{where}: has unknown {', '.join(map(str, unknown))[:200]}")


def parsed(kind: type[T], value: Any, where: str) -> T:
    """Makes a dataclass of a JSON object with exactly its fields; lists become tuples. Raises ValueError."""
    check_keys(value, {field.name for field in fields(kind)}, where)  # type: ignore[arg-type]
    return kind(**{name: tuple(item) if isinstance(item, list) else item for name, item in value.items()})


@dataclass(frozen=True)
class Column:
    """Type of one column of a shard. The column of n samples is an array [n, *shape]."""

    dtype: np.dtype
    shape: tuple[int, ...]
    """Shape of one sample."""

    @property
    def items(self) -> int:
        """Number of values per sample."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Number of bytes per sample."""
        return self.items * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The dimensions of a store: ``layout`` in spec.json.

    Raises ValueError, which names the field, if the dimensions contradict each other.
    """

    length: int
    """L, the number of tokens per sequence, special tokens included."""
    masked: int
    """M, the number of slots for masked positions per sequence; 0 if masking is off."""
    vocab_size: int
    """V, the size of the teacher's logits."""
    hidden_size: int
    """D, the hidden size of the teacher, whether or not hidden states are recorded."""
    top_k: int
    """K, the number of top logits per position; 0 if neither top-k nor logsumexp is recorded."""
    temperatures: tuple[float, ...]
    """Temperatures T_j at which logsumexp(logits / T_j) is recorded, ascending."""
    hidden_states: str
    """Number format of recorded hidden states: float16, bfloat16, int8 or none."""
    positions: str
    """Recorded positions: all (P = L), masked (P = M) or pooled (one embedding per sequence)."""
    replay_layers: int = 0
    """n, if hidden states are the input of the teacher's top n layers; 0: the output of the last layer."""
    teacher_weights: bool = True
    """Whether the store has all of the teacher's weights, or only those that replay needs."""

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
        good = good and list(self.temperatures) == sorted(set(self.temperatures))
        found = str(self.temperatures)[:200]
        require(good, f"temperatures: must be positive, ascending and distinct, not {found}")
        require(self.top_k == 0 or len(self.temperatures) > 0, "temperatures: top_k > 0 needs at least one")

    def _check_combinations(self) -> None:
        has_hidden = self.hidden_states != "none"
        if self.positions == "pooled":
            require(self.top_k == 0, "top_k: must be 0 with positions pooled")
            require(not has_hidden, "hidden_states: must be none with positions pooled")
        else:
            empty = "top_k: is 0 and hidden_states is none, so no output of the teacher would be recorded"
            require(self.top_k > 0 or has_hidden, empty)
        require(self.positions != "masked" or self.masked > 0, "positions: masked needs masked positions")
        replayable = self.positions == "all" and has_hidden
        require(self.replay_layers == 0 or replayable, "replay_layers: needs hidden states at all positions")

    @property
    def recorded(self) -> int:
        """P, the number of recorded positions per sequence; 0 if a sequence has one pooled embedding."""
        return {"all": self.length, "masked": self.masked, "pooled": 0}[self.positions]

    @property
    def id_dtype(self) -> np.dtype:
        """Dtype of token ids: uint16 if V <= 65,536, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 65536 else "<u4")

    def columns(self) -> dict[str, Column]:
        """Returns the columns of a shard in the order of the file, ``digests`` included.

        Top-k columns come before the text, hidden states after it: the text and either are one byte range.
        """
        data = {**self._topk_columns(), **self._text_columns(), **self._hidden_columns()}
        digests = {DIGESTS: Column(np.dtype("<u8"), (len(data),))}
        return {**self._topk_columns(), **digests, **self._text_columns(), **self._hidden_columns()}

    def used_slots(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns which recorded positions have a token: bool [n, P]. At other positions all values are 0."""
        if self.positions == "masked":
            return np.asarray(columns["masked_positions"] >= 0)
        return np.arange(self.length) < columns["token_count"][:, None]

    def _topk_columns(self) -> dict[str, Column]:
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
        """Returns the C columns without ``digests``, in the order in which ``digests`` lists them."""
        return {name: column for name, column in self.columns().items() if name != DIGESTS}

    def bytes_per_sample(self) -> int:
        """Returns the bytes of all columns per sample (FORMAT.md, "Bytes"), without Arrow's overhead."""
        return sum(column.bytes for column in self.columns().values())

    def smallest_read(self) -> int:
        """Returns the fewest bytes per sample that a student reads: text, and top-k or hidden states."""
        groups = [columns for columns in (self._topk_columns(), self._hidden_columns()) if columns]
        sizes = [sum(column.bytes for column in columns.values()) for columns in groups]
        return sum(column.bytes for column in self._text_columns().values()) + min(sizes, default=0)


@dataclass(frozen=True)
class Plan:
    """Sizes of the tasks, shards and blocks of a store: ``plan`` in spec.json."""

    masking_epochs: int
    """R, the number of times that each training sequence is masked. The validation split has one epoch."""
    task_sequences: int
    """Number of rows of a task; the last task of a part may have fewer."""
    block_samples: int
    """Number of samples of a block; the last block of a task may have fewer."""
    shard_blocks: int
    """Number of blocks of a shard; the last shard of a task may have fewer."""

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
        """Returns the plan with the largest blocks and shards that do not exceed these sizes.

        A block has at least one sample and at most those of a task; a shard has at least one block. Blocks
        have ``BLOCK_BYTES`` by default, or more if the smallest read would be below ``MIN_READ_BYTES``.
        """
        samples = (block_bytes or BLOCK_BYTES) // layout.bytes_per_sample()
        if block_bytes is None:
            samples = max(samples, -(-MIN_READ_BYTES // layout.smallest_read()))
        block_samples = max(1, min(samples, task_sequences, shard_bytes // layout.bytes_per_sample()))
        shard_blocks = max(1, shard_bytes // (block_samples * layout.bytes_per_sample()))
        return cls(masking_epochs, task_sequences, block_samples, min(shard_blocks, 2**24))

    def epochs(self, split: str) -> int:
        """Returns the number of masking epochs of a split."""
        return self.masking_epochs if split == "train" else 1


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens that the sequences use."""

    pad: int
    cls: int
    sep: int
    mask: int | None
    """Id of the mask token. None only if masking is off and the tokenizer has no mask token."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            absent = name == "mask" and value is None
            require(absent or is_count(value, 0, 2**31), f"special.{name}: must be a token id")
