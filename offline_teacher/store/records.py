"""JSON files in a canonical byte form, with a digest of their content, so that any changed bit is detected.

A reader encodes the parsed content again and compares the bytes. This also detects changes that do not change
the content: white space, the case of a hexadecimal digit in an escape, a repeated key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from infra.files import storage

T = TypeVar("T")
MAX_BYTES = 1 << 30
"""Largest JSON file of a store that is read. Ten million digests take half of it."""


def canonical(value: Any) -> bytes:
    """Returns the bytes of a JSON value (FORMAT.md, "Digests and JSON"). ValueError for NaN and infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode()


def encode(content: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a JSON file with this content, which has no key ``digest``, and its digest."""
    assert "digest" not in content
    return canonical({**content, "digest": storage.digest_bytes(canonical(content))})


def decode(data: bytes) -> dict[str, Any]:
    """Returns the content of a JSON file without its digest. Raises ValueError if the file is damaged."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None
    if not isinstance(value, dict) or not isinstance(value.get("digest"), str):
        raise ValueError("is not a JSON object with a digest")
    content = {key: item for key, item in value.items() if key != "digest"}
    try:
        unchanged = encode(content) == data
    except (ValueError, RecursionError):
        unchanged = False
    if not unchanged:
        raise ValueError("does not match the digest that it contains")
    return content


class Missing(ValueError):
    """The file is absent."""


def read(path: str, parse: Callable[[bytes], T], digest: str | None = None) -> tuple[T, str]:
    """Reads a file in one request. Returns the result of ``parse`` and the digest of the file.

    A damaged remote file is downloaded once more. Raises Missing if the file is absent. Raises ValueError if
    it is too large, if ``parse`` raises ValueError, or if the file does not have the given ``digest``.
    """

    def check(data: bytes) -> tuple[T, str]:
        actual = storage.digest_bytes(data)
        if digest not in (None, actual):
            raise ValueError("has another digest than the manifest says")
        return parse(data), actual

    result = storage.read_checked(path, MAX_BYTES, check)
    if result is None:
        raise Missing("is missing")
    return result
