"""Deterministic damage: input number n of a reader is always the same bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "..", "../../etc/passwd", "/etc/passwd", "a\x00b", "\ud800", "NaN"),
    *(-1, 0, 1, 7, 2**16, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**40, 0.5, -0.0, 1e308),
    *([], {}, [[]], [0, 1], {"a": {"b": 1}}, "x" * 5000, "none", "all"),
)
"""What a member of a JSON file is replaced with."""
PIECES = (
    *(
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xf0\x9f\x98\x80",
        b"\xed\xa0\x80",
        b"\n",
        b"\r\n",
        b"\t",
        b"\t\t",
        b"  ",
    ),
    *(b'"', b"'", b": ", b"- ", b"{", b"}", b"[", b"]", b"? ", b"#", b"|", b">", b"%", b"---\n", b"...\n"),
    *(b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.system [id]", b"..", b"../"),
    *(b"1e999", b"-1", b"99999999999999999999", b"true", b"null"),
)
"""What is put into bytes."""

Mutate = Callable[[random.Random, bytes], bytes]


def generator(reader: str, number: int) -> random.Random:
    return random.Random(f"{reader} {number}")


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four of: a bit, a byte, a piece put in, a range dropped, doubled or moved, the end cut off."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        stop = min(len(data), at + rng.choice((1, 1, 4, 8, 64)))
        match rng.randrange(8):
            case 0 if at < len(data):
                data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
            case 1 if at < len(data):
                data = data[:at] + bytes([rng.choice((0, 1, 127, 128, 255))]) + data[at + 1 :]
            case 2 | 3:
                data = data[:at] + rng.choice(PIECES) + data[at:]
            case 4:
                data = data[:at] + data[stop:]
            case 5:
                data = data[:stop] + data[at:stop] * rng.choice((1, 2, 50)) + data[stop:]
            case 6:
                to = rng.randrange(len(data) + 1)
                data = data[:to] + data[at:stop] + data[to:]
            case _:
                data = data[: max(at, len(data) // 2)] if rng.random() < 0.3 else data
    return data


def mutate_json(rng: random.Random, data: bytes) -> Any:
    """The JSON value with one to three members replaced, dropped, added or doubled."""
    tree = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(_places(tree, []) or [(tree, "new")])
        match rng.randrange(5):
            case 0 if isinstance(holder, dict):
                holder.pop(key, None)
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("digest", "../x", "extra", ""))] = copy.deepcopy(rng.choice(VALUES))
            case 2 if isinstance(holder, list) and holder:
                holder.append(rng.choice(holder))
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found.append((tree, key))
        _places(value, found)
    return found
