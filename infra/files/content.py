"""Decides from the first block of a file whether the file is text, and names the format of a binary file."""

from __future__ import annotations

import codecs
import re
import unicodedata

BLOCK = 1 << 13
"""Number of bytes at the start of a file that are examined."""
_START = 512
"""Number of bytes at the start that are also examined alone, since text may follow a binary file's header."""
_CONTROLS = bytes({*range(0x20), 0x7F} - {*b"\b\t\n\v\f\r\x1b"})
"""Control characters that occur only in damaged texts. (Backspaces underline text, and escapes colour it.)"""
_NUL_SHARE = 0.01
"""Largest share of NUL bytes in a text."""
_CONTROL_SHARE = 0.1
"""Largest share of control characters in a text. A quotation mark cut to its last byte is a control
character; up to 5 % of a dialogue can be such bytes."""
_SOME_CONTROLS, _INVALID_SHARE = 0.005, 0.05
"""A block with more than both shares, of control characters and of invalid UTF-8, is binary. Compressed and
encrypted bytes are uniformly distributed: 10 % are control characters, and most are invalid UTF-8. A text in
an 8-bit encoding is invalid UTF-8 too, but it has no control characters."""

_BEGINNINGS = {
    "gzip": rb"\x1f\x8b",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # a frame or a skippable frame
    "bzip2": rb"BZh[1-9](\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "zip": rb"PK(\x03\x04|\x05\x06)",
    "Parquet": rb"PAR1\x15",  # includes the first byte of the page header, since a text may begin with "PAR1"
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
"""Name of the format of a file that is not text and has no known first bytes."""


def binary_format(block: bytes) -> str | None:
    """Returns the format of a file that begins with ``block``: a key of ``_BEGINNINGS``, a wide encoding, or
    BINARY; None for text.

    Text is UTF-8 or an 8-bit encoding, and may contain a few damaged characters.
    """
    for kind, beginning in _BEGINNINGS.items():
        if re.match(beginning, block, re.DOTALL):
            return kind
    if any(map(_is_binary, (block[:_START], block[:BLOCK]))):
        return _wide_encoding(block[:BLOCK]) or BINARY
    return None


def _is_binary(block: bytes) -> bool:
    if block.count(0) > max(_NUL_SHARE * len(block), 3):
        return True
    controls = len(block) - len(block.translate(None, _CONTROLS))
    if controls <= max(_SOME_CONTROLS * len(block), 3):
        return False
    invalid = block.decode(errors="replace").count("\ufffd")
    return controls > _CONTROL_SHARE * len(block) or invalid > _INVALID_SHARE * len(block)


def _wide_encoding(block: bytes) -> str | None:
    """Returns UTF-16 or UTF-32 if ``block`` is such a text without a byte-order mark, else None."""
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(block)
        except UnicodeDecodeError:
            continue
        controls = sum(unicodedata.category(c).startswith("C") and c not in "\t\n\r" for c in text)
        if text and controls <= _NUL_SHARE * len(text):
            return encoding[:6].upper()
    return None
