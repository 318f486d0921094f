"""The index files of finished tasks and parts. Every field is checked when an index is read."""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from offline_teacher.store.numbering import Task, shards_of
from offline_teacher.store.records import decode, encode
from offline_teacher.store.schema import SPLITS, Layout, Plan, check_keys, is_count, parsed, require

_DIGEST = re.compile(r"xxh3-128:[0-9a-f]{32}")
_SHARD_FILE = re.compile(r"[0-9a-f]{32}\.arrow")
_HEX = re.compile(r"(?:[0-9a-f]{16})+")


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def shard_file(digest: str) -> str:
    """Returns the file name of a shard with this digest: its 32 hexadecimal digits and ``.arrow``."""
    return f"{digest.removeprefix('xxh3-128:')}.arrow"


def _require_fields(value: Any, digests: tuple[str, ...], counts: tuple[str, ...]) -> None:
    for name in digests:
        require(is_digest(getattr(value, name)), f"{name}: must be xxh3-128:<32 hex>")
    for name in counts:
        require(is_count(getattr(value, name)), f"{name}: must be a whole number")


@dataclass(frozen=True)
class Frame:
    """Byte layout of the Arrow messages of all blocks with the same number of rows."""

    bytes: int
    """Size of the message."""
    offsets: dict[str, int]
    """Column -> byte offset of its buffer in the message, a multiple of 8."""

    def check(self, layout: Layout, rows: int) -> None:
        """Raises ValueError unless all columns fit into the message, in order and without overlap."""
        require(is_count(self.bytes, 1, 2**40), "frames: bytes must be a whole number")
        columns = layout.columns()
        check_keys(self.offsets, set(columns), "frames: offsets")
        end = 0
        for name, column in columns.items():
            offset = self.offsets[name]
            require(is_count(offset, end, self.bytes) and offset % 8 == 0, f"frames: wrong offset of {name}")
            end = offset + rows * column.bytes
        require(end <= self.bytes, "frames: a column ends after its message")


@dataclass(frozen=True)
class ShardIndex:
    """One shard, as the index of its task records it; FORMAT.md explains the fields."""

    file: str
    bytes: int
    samples: int
    start: int
    blocks: str

    def __post_init__(self) -> None:
        named = isinstance(self.file, str) and _SHARD_FILE.fullmatch(self.file) is not None
        require(named, "shards: file must be <32 hex>.arrow")
        counts = all(map(is_count, (self.bytes, self.samples, self.start)))
        require(counts, "shards: bytes, samples and start must be whole numbers")
        good = isinstance(self.blocks, str) and _HEX.fullmatch(self.blocks) is not None
        require(good, "shards: blocks must be 16 hexadecimal digits per block")

    @property
    def digest(self) -> str:
        return f"xxh3-128:{self.file.removesuffix('.arrow')}"

    @cached_property
    def block_digests(self) -> np.ndarray:
        """Digest of each block: uint64 [blocks]."""
        return np.frombuffer(builtins.bytes.fromhex(self.blocks), ">u8").astype(np.uint64)


@dataclass(frozen=True)
class TaskIndex:
    """The index of a task, ``tasks/SPLIT/TASK.json``; FORMAT.md explains the fields."""

    split: str
    task: str
    spec: str
    samples: int
    tokens: int
    masked: int
    environment: dict[str, str | int | float | bool | None]
    frames: dict[int, Frame]
    """Number of rows of a block -> frame: one entry, or two if the last block is short."""
    shards: tuple[ShardIndex, ...]

    def __post_init__(self) -> None:
        require(self.split in SPLITS, "split: must be train or validation")
        require(isinstance(self.task, str) and 0 < len(self.task) <= 40, "task: must be the name of a task")
        _require_fields(self, ("spec",), ("samples", "tokens", "masked"))
        good = isinstance(self.environment, Mapping) and len(self.environment) <= 100
        good = good and all(isinstance(key, str) for key in self.environment)
        good = good and all(v is None or isinstance(v, str | int | float) for v in self.environment.values())
        require(good, "environment: must be an object whose values are strings, numbers, booleans or null")

    def check(self, layout: Layout, plan: Plan, split: str, task: Task, spec: str) -> None:
        """Raises ValueError if this is the index of another task, or an offset is outside its shard."""
        own = self.split, self.task, self.spec, self.samples
        require(own == (split, task.name, spec, task.samples), "is the index of another task")
        expected = shards_of(task, plan)
        sizes = {count for shard in expected for count in shard}
        require(set(self.frames) == sizes, f"frames: must be of blocks with {sorted(sizes)} rows")
        for rows, frame in self.frames.items():
            frame.check(layout, rows)
        require(len(self.shards) == len(expected), f"shards: has {len(self.shards)}, not {len(expected)}")
        bytes_of = {rows: frame.bytes for rows, frame in self.frames.items()}
        for shard, counts in zip(self.shards, expected, strict=True):
            blocks = sum(map(bytes_of.__getitem__, counts))
            require(shard.samples == sum(counts), f"shards: {shard.file} must have {sum(counts)} samples")
            require(len(shard.blocks) == 16 * len(counts), f"shards: {shard.file} has {len(counts)} blocks")
            require(shard.start % 8 == 0, f"shards: start of {shard.file} must be a multiple of 8")
            require(shard.start + blocks <= shard.bytes, f"shards: {shard.file} is too short for its blocks")

    def to_bytes(self) -> bytes:
        frames = {str(rows): asdict(frame) for rows, frame in self.frames.items()}
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return encode({**own, "frames": frames, "shards": [asdict(shard) for shard in self.shards]})

    @classmethod
    def from_bytes(cls, data: bytes) -> TaskIndex:
        """Parses the index of a task. Raises ValueError, which says what is wrong, if it is invalid."""
        value = decode(data)
        check_keys(value, {field.name for field in fields(cls)}, "index")
        require(isinstance(value["frames"], dict), "frames: must be an object")
        require(isinstance(value["shards"], list), "shards: must be a list")
        frames = {}
        for rows, frame in value["frames"].items():
            require(re.fullmatch(r"[1-9]\d{0,9}", rows) is not None, "frames: keys must be numbers of rows")
            frames[int(rows)] = parsed(Frame, frame, "frames")
        shards = tuple(parsed(ShardIndex, shard, "shards") for shard in value["shards"])
        return cls(**{**value, "frames": frames, "shards": shards})


@dataclass(frozen=True)
class PartIndex:
    """The index of a part of the text, ``sequences/SPLIT/part-00000.json``; FORMAT.md explains the fields."""

    split: str
    part: int
    bytes: int
    file: str
    text: str
    made_from: str
    rows: int
    tokens: int
    documents: int
    text_bytes: int
    problems: dict[str, Any]
    """See `Problems.to_json`."""
    counts: str | None = None

    def __post_init__(self) -> None:
        require(self.split in SPLITS, "split: must be train or validation")
        numbers = ("part", "bytes", "rows", "tokens", "documents", "text_bytes")
        _require_fields(self, ("file", "text", "made_from"), numbers)
        require(self.rows <= 2**32, "rows: must be 2^32 at most")
        require(isinstance(self.problems, Mapping), "problems: must be an object")
        require(self.counts is None or is_digest(self.counts), "counts: must be xxh3-128:<32 hex>")

    def to_bytes(self) -> builtins.bytes:
        return encode(asdict(self))

    @classmethod
    def from_bytes(cls, data: builtins.bytes) -> PartIndex:
        """Parses the index of a part. Raises ValueError, which says what is wrong, if it is invalid."""
        return parsed(cls, decode(data), "index")
