"""The indices of a store: what a finished task and a finished part hold. Every field is checked when read."""

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
    """The name of a shard with this digest: its 32 hexadecimal digits and ``.arrow``."""
    return f"{digest.removeprefix('xxh3-128:')}.arrow"


def _require_fields(value: Any, digests: tuple[str, ...], counts: tuple[str, ...]) -> None:
    for name in digests:
        require(is_digest(getattr(value, name)), f"{name}: must be xxh3-128:<32 hex>")
    for name in counts:
        require(is_count(getattr(value, name)), f"{name}: must be a whole number")


@dataclass(frozen=True)
class Frame:
    """The message of a block with a certain number of rows, as pyarrow wrote it."""

    bytes: int
    offsets: dict[str, int]
    """Column -> where its buffer starts, from the start of the message; multiples of 8."""

    def check(self, layout: Layout, rows: int) -> None:
        """ValueError unless every column has room inside the message, in order and without overlap."""
        require(is_count(self.bytes, 1, 2**40), "frames: bytes must be a whole number")
        columns = layout.columns()
        check_keys(self.offsets, set(columns), "frames: offsets")
        end = 0
        for name, column in columns.items():
            offset = self.offsets[name]
            require(is_count(offset, end, self.bytes) and offset % 8 == 0, f"frames: offset of {name}")
            end = offset + rows * column.bytes
        require(end <= self.bytes, "frames: a column ends behind its message")


@dataclass(frozen=True)
class ShardIndex:
    """One shard of a task."""

    file: str
    """Its name: the 32 hexadecimal digits of its digest, and ``.arrow``."""
    bytes: int
    samples: int
    start: int
    """Offset of its first block."""
    blocks: str
    """16 hexadecimal digits for each block: XXH3 (64 bits) of the bytes of its ``digests`` column."""

    def __post_init__(self) -> None:
        name = self.file
        require(isinstance(name, str) and _SHARD_FILE.fullmatch(name) is not None, "shards: file")
        counts = all(map(is_count, (self.bytes, self.samples, self.start)))
        require(counts, "shards: bytes, samples and start must be whole numbers")
        good = isinstance(self.blocks, str) and _HEX.fullmatch(self.blocks) is not None
        require(good, "shards: blocks must be 16 hexadecimal digits a block")

    @property
    def digest(self) -> str:
        return f"xxh3-128:{self.file.removesuffix('.arrow')}"

    @cached_property
    def block_digests(self) -> np.ndarray:
        """uint64 [blocks]."""
        return np.frombuffer(builtins.bytes.fromhex(self.blocks), ">u8").astype(np.uint64)


@dataclass(frozen=True)
class TaskIndex:
    """What a finished task holds: ``tasks/SPLIT/TASK.json``. A task without its index does not exist."""

    split: str
    task: str
    spec: str
    """Digest of spec.json."""
    samples: int
    tokens: int
    """Real tokens in them."""
    masked: int
    """Masked tokens in them."""
    environment: dict[str, str | int | float | bool | None]
    """What decides the last bits of the teacher's numbers."""
    frames: dict[int, Frame]
    """Rows of a block -> its frame; one entry, or two if the last block is short."""
    shards: tuple[ShardIndex, ...]

    def __post_init__(self) -> None:
        require(self.split in SPLITS, "split: must be train or validation")
        require(isinstance(self.task, str) and 0 < len(self.task) <= 40, "task: must be the name of a task")
        _require_fields(self, ("spec",), ("samples", "tokens", "masked"))
        good = isinstance(self.environment, Mapping) and len(self.environment) <= 100
        good = good and all(isinstance(key, str) for key in self.environment)
        good = good and all(v is None or isinstance(v, str | int | float) for v in self.environment.values())
        require(good, "environment: must be an object of names and plain values")

    def check(self, layout: Layout, plan: Plan, split: str, task: Task, spec: str) -> None:
        """ValueError unless this is the index of this task, and every offset in it stays inside its shard."""
        own = self.split, self.task, self.spec, self.samples
        require(own == (split, task.name, spec, task.samples), "is the index of another task")
        expected = shards_of(task, plan)
        sizes = {count for shard in expected for count in shard}
        require(set(self.frames) == sizes, f"frames: must be those of {sorted(sizes)} rows")
        for rows, frame in self.frames.items():
            frame.check(layout, rows)
        require(len(self.shards) == len(expected), f"shards: lists {len(self.shards)}, not {len(expected)}")
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
        """ValueError says in which way the bytes are no index of a task."""
        value = decode(data)
        check_keys(value, {field.name for field in fields(cls)}, "index")
        require(isinstance(value["frames"], dict), "frames: must be an object")
        require(isinstance(value["shards"], list), "shards: must be a list")
        frames = {}
        for rows, frame in value["frames"].items():
            require(re.fullmatch(r"[1-9]\d{0,9}", rows) is not None, "frames: must be by numbers of rows")
            frames[int(rows)] = parsed(Frame, frame, "frames")
        shards = tuple(parsed(ShardIndex, shard, "shards") for shard in value["shards"])
        return cls(**{**value, "frames": frames, "shards": shards})


@dataclass(frozen=True)
class PartIndex:
    """What a finished part of the text holds: ``sequences/SPLIT/part-00000.json``."""

    split: str
    part: int
    bytes: int
    file: str
    """Digest of the part's Arrow file."""
    text: str
    """Digest of the text."""
    made_from: str
    """Digest of settings, tokenizer and sizes."""
    rows: int
    tokens: int
    documents: int
    text_bytes: int
    problems: dict[str, Any]
    """What was wrong with the text, and how often."""
    counts: str | None = None
    """Digest of the file of token counts, if masking is by frequency."""

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
        """ValueError says in which way the bytes are no index of a part."""
        return parsed(cls, decode(data), "index")
