"""JSON files that notice any changed bit: one canonical byte form, and a digest over the content.

Reading compares the file with the canonical form of what it says. So a change is also found that JSON itself
does not see: white space, the case of a hexadecimal digit in an escape, a repeated key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from infra.files import storage

T = TypeVar("T")
MAX_BYTES = 1 << 30
"""No JSON file of a store is larger: ten million digests take half of it."""


def canonical(value: Any) -> bytes:
    """The one byte form of a JSON value (FORMAT.md, "Digests and JSON"). ValueError on NaN and infinities."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode()


def encode(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file with this content, which has no member ``digest``."""
    assert "digest" not in content
    return canonical({**content, "digest": storage.digest_bytes(canonical(content))})


def decode(data: bytes) -> dict[str, Any]:
    """The content of a JSON file without its digest. ValueError says how the file is damaged."""
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
        raise ValueError("does not match the digest that it carries")
    return content


class Missing(ValueError):
    """The file is absent."""


def read(path: str, parse: Callable[[bytes], T], digest: str | None = None) -> tuple[T, str]:
    """What ``parse`` makes of a file, which is read in one request, and the digest of the file.

    A remote file that is damaged is downloaded again. Raises Missing if it is absent, and ValueError if it is
    too large, if ``parse`` does, or if its digest is not ``digest``.
    """

    def check(data: bytes) -> tuple[T, str]:
        found = storage.digest_bytes(data)
        if digest not in (None, found):
            raise ValueError("has another digest than the manifest says")
        return parse(data), found

    result = storage.read_checked(path, MAX_BYTES, check)
    if result is None:
        raise Missing("is missing")
    return result
