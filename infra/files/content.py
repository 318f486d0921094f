"""Decides by the first block of a file whether it is text, and names the format of other files."""

from __future__ import annotations

import codecs
import re
import unicodedata

BLOCK = 1 << 13
"""Bytes at the start of a file that are looked at."""
_START = 512
"""Bytes at the start of that block that are also looked at alone: the header of a binary file may be followed
by pages of text."""
_CONTROLS = bytes({*range(0x20), 0x7F} - {*b"\b\t\n\v\f\r\x1b"})
"""Control characters that occur only in damaged texts. (Backspaces underline text, and escapes colour it.)"""
_NULS = 0.01
_CONTROL_SHARE = 0.1
"""Quotation marks that were cut to their last byte are control characters, up to 5 % of a dialogue."""
_SOME_CONTROLS, _INVALID_SHARE = 0.005, 0.05
"""Together. Uniformly distributed bytes, as compression and encryption make them, are 10 % control characters
and mostly no UTF-8; a text in an older 8-bit encoding is no UTF-8 either, but has no control characters."""

_BEGINNINGS = {
    "gzip": rb"\x1f\x8b",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # a frame, or one to be skipped
    "bzip2": rb"BZh[1-9](\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "zip": rb"PK(\x03\x04|\x05\x06)",
    "Parquet": rb"PAR1\x15",  # with the first byte of a header: a text may begin with the letters
    "UTF-32": rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff",
    "UTF-16": rb"\xff\xfe|\xfe\xff",
    "Arrow": rb"ARROW1\x00\x00|\xff\xff\xff\xff...\x00",  # the file format, the stream format
    "PDF": rb"%PDF-\d\.\d\s",
    "SQLite": rb"SQLite format 3\x00",
    "pickle": rb"\x80[\x02-\x05]",
    "NumPy": rb"\x93NUMPY",
    "tar": rb".{257}ustar",
}
BINARY = "binary"
"""Name for a file that is not text and has no known beginning."""


def content_of(block: bytes) -> str | None:
    """What a file that begins with ``block`` holds: a key of ``_BEGINNINGS`` or BINARY; None for text.

    Text is UTF-8 or another encoding of bytes, with a few damaged characters if need be.
    """
    for kind, beginning in _BEGINNINGS.items():
        if re.match(beginning, block, re.DOTALL):
            return kind
    if any(map(_is_binary, (block[:_START], block[:BLOCK]))):
        return _wide_encoding(block[:BLOCK]) or BINARY
    return None


def _is_binary(block: bytes) -> bool:
    nuls = block.count(0)
    if nuls > max(_NULS * len(block), 3):
        return True
    controls = len(block) - len(block.translate(None, _CONTROLS))
    if controls <= max(_SOME_CONTROLS * len(block), 3):
        return False
    invalid = block.decode(errors="replace").count("\ufffd")
    return controls > _CONTROL_SHARE * len(block) or invalid > _INVALID_SHARE * len(block)


def _wide_encoding(block: bytes) -> str | None:
    """The encoding of a text in units of two or four bytes without a byte-order mark."""
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(block)
        except UnicodeDecodeError:
            continue
        odd = sum(unicodedata.category(c).startswith("C") and c not in "\t\n\r" for c in text)
        if text and odd <= _NULS * len(text):
            return encoding[:6].upper()
    return None
