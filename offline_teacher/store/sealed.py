"""JSON files that notice any changed bit: one canonical byte form, and a digest over the content.

A sealed file is ``canonical({**content, "digest": digest(canonical(content))})``. Reading compares
the file with the canonical form of what it says, so that a change JSON itself would not notice
(white space, the case of a hexadecimal digit in an escape, a repeated key) is found as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from infra import storage
from infra.errors import UserError

MAX_BYTES = 1 << 30
"""No sealed file is larger: 10 million shard digests take half of it."""


def canonical(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, indent 1, ASCII, a newline at the end.

    Raises ValueError on NaN and infinities.
    """
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def content_digest(value: Any) -> str:
    """``xxh3-128:<32 hex>`` over the canonical form."""
    return storage.digest_bytes(canonical(value))


def seal(content: Mapping[str, Any]) -> bytes:
    """The bytes of a sealed file. ``content`` has no key ``digest``."""
    assert "digest" not in content
    return canonical({**content, "digest": content_digest(dict(content))})


def unseal(data: bytes) -> dict[str, Any]:
    """The content of a sealed file, without its digest. ValueError says in what way it is damaged."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None
    if not isinstance(value, dict) or not isinstance(value.get("digest"), str):
        raise ValueError("is not a JSON object with a digest")
    content = {key: item for key, item in value.items() if key != "digest"}
    try:
        unchanged = seal(content) == data
    except (ValueError, RecursionError):
        unchanged = False
    if not unchanged:
        raise ValueError("does not match the digest it carries")
    return content


def read_sealed(path: str, advice: str) -> dict[str, Any]:
    """Content of the sealed file ``path``. UserError, ending in ``advice``, where it is absent or damaged."""
    if not storage.exists(path):
        raise UserError(f"{path} is missing: {advice}")
    if storage.size(path) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES} bytes: {advice}")
    try:
        return storage.read_checked(path, unseal)
    except ValueError as error:
        raise UserError(f"{path} {error}: {advice}") from None
