"""Checks that the first block of a corpus file has the format that its name and ``corpus.source`` promise."""

from __future__ import annotations

from infra.errors import UserError
from infra.files.content import BINARY, BLOCK, binary_format
from infra.files.streams import compression, decompress_beginning, first_bytes
from infra.redaction import without_secrets

COMPRESSED_BLOCK = 1 << 16
"""Bytes of a compressed file that are read for the first block of text; zstd compresses 128 KiB at once."""


def require_format(path: str, size: int, source: str) -> None:
    """Raises UserError, with the format found and what to do, if a file of ``size`` bytes has another one."""
    count = COMPRESSED_BLOCK if compression(path) else BLOCK
    head = first_bytes(path, size, count)
    problem = _format_problem(head, path, source) if head else None
    if problem is not None:
        raise UserError(f"{without_secrets(path)}: {problem}")


def _format_problem(head: bytes, path: str, source: str) -> str | None:
    """Returns why a file with these first bytes cannot be read and what to do, or None if it can be."""
    content, codec, prefix = binary_format(head), compression(path), ""
    if codec is not None:
        if content != codec:
            return f"is not {codec}, as its name says; rename it"
        content, prefix = binary_format(decompress_beginning(head, path, BLOCK)), "decompressed, it "
    if content is None or (source == "parquet" and content in ("Parquet", BINARY)):
        return None  # a damaged Parquet file is counted by its reader
    return prefix + _REFUSALS.get(content, f"is a {content} file; {_EXPORT}")


_EXPORT = "write its documents as UTF-8 text, JSON lines or Parquet"
_REFUSALS = {
    "gzip": "is compressed with gzip; let its name end in .gz",
    "zstd": "is compressed with zstd; let its name end in .zst",
    **{kind: f"is compressed with {kind}; repack it as .gz or .zst" for kind in ("bzip2", "xz", "zip")},
    **{kind: f"is {kind}; convert it to UTF-8" for kind in ("UTF-16", "UTF-32")},
    "Parquet": "is a Parquet file; set corpus.source: parquet",
    "Arrow": "is an Arrow file; set corpus.source: hub and corpus.path to its directory",
    "SQLite": f"is an SQLite database; {_EXPORT}",
    "tar": "is a tar archive; unpack it",
}
"""Binary format -> the error message about it. Other formats get a message with only their name."""
