"""Four formats for the same teacher outputs: this project's store, and three that other programs use.

Every format writes its files into a directory, and reads samples by number. A reader names the sample that it
cannot read, also where its library does not. Axes: n samples; the columns are those of `Layout`.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
import zstandard

from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.parts import publish_part
from offline_teacher.store.schema import Columns, Layout, Plan
from offline_teacher.store.store import open_store
from offline_teacher.store.writer import TaskWriter, begin_store, finish_store
from student_train.data.collate import TEACHER_COLUMNS, TEXT_COLUMNS
from student_train.data.reading import Samples
from tests.store.synthetic import ENVIRONMENT, make_spec, quantise, write_files

Read = Callable[[np.ndarray], Columns]
"""Returns the columns [n, *shape] of the samples with these numbers, int64 [n]."""
WRITTEN_AT_ONCE = 64
"""Number of samples that the store's writer gets at a time, as from one batch of a teacher."""
ZSTD_LEVEL = 3
"""zstd's own default."""


class UnreadableSample(Exception):
    """A sample that cannot be read; the message names it."""

    def __init__(self, number: int, error: Exception) -> None:
        super().__init__(f"sample {number}: {type(error).__name__}: {error}")


class Format(Protocol):
    """The interface of a format."""

    @property
    def name(self) -> str: ...

    def kept(self, outputs: Columns) -> Columns:
        """Returns the columns that the format keeps of `make_outputs`, in the dtypes of the format."""
        ...

    def write(self, directory: Path, columns: Columns) -> None:
        """Writes columns that ``kept`` has returned into an empty directory."""
        ...

    def files(self, directory: Path) -> list[Path]:
        """Returns the files that hold samples and what is needed to find them."""
        ...

    def payload(self, directory: Path) -> list[Path]:
        """Returns the files that hold samples."""
        ...

    @contextmanager
    def opened(self, directory: Path) -> Iterator[Read]:
        """Opens the files, builds the index that random access needs, and yields the reader."""
        ...


@dataclass(frozen=True)
class StoreFormat:
    """A store with one task, written by its writer and read as training reads it: with every digest checked.
    The place of a sample in a memory-mapped shard follows from its number."""

    layout: Layout

    @property
    def name(self) -> str:
        return "store, int8" if self.layout.hidden_states == "int8" else "store"

    def kept(self, outputs: Columns) -> Columns:
        hidden = {}
        if self.layout.hidden_states == "int8":
            hidden["hidden_states"], hidden["hidden_scale"] = quantise(outputs["hidden_states"])
        columns = self.layout.data_columns()
        return {name: {**outputs, **hidden}[name].astype(columns[name].dtype) for name in columns}

    def write(self, directory: Path, columns: Columns) -> None:
        root, n = str(directory), len(columns["input_ids"])
        spec = make_spec(self.layout, Plan.from_bytes(self.layout, 1, n))
        begin_store(root, spec)
        write_files(root, spec, weights={"none": np.zeros(1, np.float32)}, tokenizer={"vocab.txt": b"[PAD]"})
        digest = spec.digest
        facts = {"text": digest, "made_from": digest, "documents": 1, "text_bytes": 1, "problems": {}}
        text = {name: columns[name] for name in ("input_ids", "token_count")}
        publish_part(root, self.layout, "train", 0, text, facts)
        task = SplitPlan.of("train", (n,), spec.plan).task(0)
        with TaskWriter(root, spec, "train", task, ENVIRONMENT) as writer:
            for at in range(0, n, WRITTEN_AT_ONCE):
                writer.write({name: values[at : at + WRITTEN_AT_ONCE] for name, values in columns.items()})
            writer.publish()
        finish_store(root, {"train": 1})

    def files(self, directory: Path) -> list[Path]:
        root_files = [directory / "spec.json", directory / "manifest.json"]
        return [*root_files, *directory.glob("tasks/train/*.json"), *self.payload(directory)]

    def payload(self, directory: Path) -> list[Path]:
        return sorted(directory.glob("shards/train/*/*.arrow"))

    @contextmanager
    def opened(self, directory: Path) -> Iterator[Read]:
        store = open_store(str(directory))
        names = [name for name in TEXT_COLUMNS + TEACHER_COLUMNS if name in self.layout.columns()]
        samples, size = Samples(store, "train", names), store.plan.block_samples

        def read(numbers: np.ndarray) -> Columns:
            return dict(samples.gather(np.zeros_like(numbers), *np.divmod(numbers, size)))

        yield read


@dataclass(frozen=True)
class _OneFile:
    """A format with a single file. Its columns are the store's without ``sequence_id``."""

    layout: Layout
    file: ClassVar[str]
    float_dtype: ClassVar[type] = np.float32
    """Dtype of logits and hidden states. In every format logsumexp is float32, and ids are int32."""

    def dtypes(self) -> dict[str, type]:
        """Returns column name -> dtype, in the order of the store's columns."""
        floats = {"topk_logits": self.float_dtype, "hidden_states": self.float_dtype, "logsumexp": np.float32}
        names = [name for name in self.layout.data_columns() if name != "sequence_id"]
        return {name: floats.get(name, np.int32) for name in names}

    def kept(self, outputs: Columns) -> Columns:
        return {name: outputs[name].astype(dtype) for name, dtype in self.dtypes().items()}

    def files(self, directory: Path) -> list[Path]:
        return [directory / self.file]

    def payload(self, directory: Path) -> list[Path]:
        return [directory / self.file]

    def _stacked(self, numbers: np.ndarray, load: Callable[[int], Columns]) -> Columns:
        """Returns the samples that ``load`` returns, column by column [n, *shape]."""
        samples = []
        for number in numbers.tolist():
            try:
                sample = load(number)
                samples.append({name: sample[name] for name in self.dtypes()})
            except Exception as error:
                raise UnreadableSample(number, error) from error
        return {name: np.stack([sample[name] for sample in samples]) for name in self.dtypes()}


@dataclass(frozen=True)
class TarFormat(_OneFile):
    """A tar file whose members are dicts of tensors, written by ``torch.save`` and compressed by zstd.

    Opening scans the headers of all members. A read decompresses the sample's whole member, unless the last
    sample was in the same member."""

    member_samples: int = 1
    checksum: bool = False
    """Whether zstd adds its checksum to each member, which its Python package does not do by default."""
    file = "samples.tar"
    float_dtype = np.float16

    @property
    def name(self) -> str:
        several = f", {self.member_samples} a member" if self.member_samples > 1 else ""
        return f"zstd torch.save in tar{several}{', with checksum' if self.checksum else ''}"

    def write(self, directory: Path, columns: Columns) -> None:
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=self.checksum)
        with tarfile.open(directory / self.file, "w") as tar:
            for at in range(0, len(columns["input_ids"]), self.member_samples):
                # Copies, because torch.save writes the whole memory behind a view.
                rows = {
                    name: values[at : at + self.member_samples].copy() for name, values in columns.items()
                }
                buffer = io.BytesIO()
                torch.save({name: torch.from_numpy(row) for name, row in rows.items()}, buffer)
                data = compressor.compress(buffer.getbuffer())
                member = tarfile.TarInfo(_member(at))
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    @contextmanager
    def opened(self, directory: Path) -> Iterator[Read]:
        decompressor = zstandard.ZstdDecompressor()
        with tarfile.open(directory / self.file) as tar:
            places = {member.name: (member.offset_data, member.size) for member in tar}

        @lru_cache(maxsize=1)
        def tensors(first: int) -> dict[str, torch.Tensor]:
            offset, size = places[_member(first)]
            data = decompressor.decompress(os.pread(file.fileno(), size, offset))
            return dict(torch.load(io.BytesIO(data), weights_only=True))

        def load(number: int) -> Columns:
            row = number % self.member_samples
            return {name: tensor[row].numpy() for name, tensor in tensors(number - row).items()}

        with open(directory / self.file, "rb") as file:
            yield lambda numbers: self._stacked(numbers, load)


def _member(first: int) -> str:
    """Returns the name of the member that begins with this sample."""
    return f"{first:08d}.pt.zst"


class RecordFormat(_OneFile):
    """Records of a fixed size: every number in 4 bytes. A sample's place is its number times that size."""

    name: ClassVar[str] = "float32 records"
    file = "samples.bin"

    def _record(self) -> np.dtype:
        columns = self.layout.data_columns()
        return np.dtype([(name, dtype, columns[name].shape) for name, dtype in self.dtypes().items()])

    def write(self, directory: Path, columns: Columns) -> None:
        with open(directory / self.file, "wb") as file:
            for at in range(0, len(columns["input_ids"]), WRITTEN_AT_ONCE):
                rows = {name: values[at : at + WRITTEN_AT_ONCE] for name, values in columns.items()}
                records = np.empty(len(rows["input_ids"]), self._record())
                for name, values in rows.items():
                    records[name] = values
                records.tofile(file)

    @contextmanager
    def opened(self, directory: Path) -> Iterator[Read]:
        records = np.memmap(directory / self.file, self._record(), mode="r")
        yield lambda numbers: {name: records[name][numbers] for name in self.dtypes()}


class JsonFormat(_OneFile):
    """One JSON object per line and sample. Opening scans the file for the ends of lines; a read parses the
    sample's whole line."""

    name: ClassVar[str] = "JSON lines"
    file = "samples.jsonl"

    def write(self, directory: Path, columns: Columns) -> None:
        with open(directory / self.file, "w") as file:
            for number in range(len(columns["input_ids"])):
                row = {name: values[number].tolist() for name, values in columns.items()}
                file.write(f"{json.dumps(row)}\n")

    @contextmanager
    def opened(self, directory: Path) -> Iterator[Read]:
        def load(number: int) -> Columns:
            row = json.loads(data[starts[number] : starts[number + 1]])
            return {name: np.array(row[name], dtype) for name, dtype in self.dtypes().items()}

        with (
            open(directory / self.file, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            starts = [0]
            while (end := data.find(b"\n", starts[-1])) >= 0:
                starts.append(end + 1)
            yield lambda numbers: self._stacked(numbers, load)
