"""JSON files that notice any changed bit: one canonical byte form, and a digest over the content.

Reading compares the file with the canonical form of what it says. So a change is also found that JSON itself
does not see: white space, the case of a hexadecimal digit in an escape, a repeated key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from infra.files import storage

MAX_BYTES = 1 << 30
"""No JSON file of a store is larger: ten million digests take half of it."""


def canonical(value: Any) -> bytes:
    """The one byte form of a JSON value (FORMAT.md, "Digests and JSON"). ValueError on NaN and infinities."""
    return f"{_text(value)}\n".encode()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def encode(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file with this content, which has no member ``digest``."""
    assert "digest" not in content
    members = {key: f"{_text(key)}:{_text(value)}" for key, value in content.items()}
    members["digest"] = f'"digest":"{storage.digest_bytes(_object(members))}"'
    return _object(members)


def _object(members: Mapping[str, str]) -> bytes:
    """The canonical form of an object whose members have that form already. Each is made once for both."""
    return f"{{{','.join(members[key] for key in sorted(members))}}}\n".encode()


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


def read(path: str, digest: str | None = None) -> bytes | None:
    """The bytes of a JSON file in one request; None if it is absent.

    A remote one that does not match its digest is downloaded again. ValueError if it is damaged, too large to
    be one, or if its file digest is not ``digest``.
    """

    def check(data: bytes) -> bytes:
        if digest is None:
            decode(data)
        elif storage.digest_bytes(data) != digest:
            raise ValueError("has another digest than the manifest says")
        return data

    return storage.read_checked(path, MAX_BYTES, check)
