"""A corpus read as the pass reads it, and what tests of it share."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from infra.settings.sections import Corpus
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import parts
from offline_teacher.corpus.problems import Problems


def read(
    corpus: Corpus, part_bytes: int = 1 << 20, validation: bool = False
) -> tuple[list[list[str]], Problems]:
    problems = Problems(corpus.strict)
    return [list(documents(p, corpus, problems)) for p in parts(corpus, part_bytes, validation)], problems


def flat(texts: list[list[str]]) -> list[str]:
    return [text for part in texts for text in part]


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


WORDS = b"".join(b"%d is a line of the text\n" % number for number in range(40_000))
