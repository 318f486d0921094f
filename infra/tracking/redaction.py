"""Removes credentials from URLs, secrets from parameters, and all but the first line from errors, before
logging."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from infra.errors import first_line

LONGEST_VALUE = 6000
"""Characters: MLflow's limit of a param."""


def redact(text: str) -> str:
    """``text`` without user names and passwords of URIs and without secrets in their queries."""
    text = re.sub(r"(\b[a-z][a-z0-9+.-]*://)[^/\s]*@", r"\1", text, flags=re.IGNORECASE)
    secret = r"[^=&\s]*(?:token|secret|passw|key|sig|credential)[^=&\s]*"
    return re.sub(rf"([?&]{secret}=)[^&\s#]*", r"\1***", text, flags=re.IGNORECASE)


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested mappings and dataclasses as ``section.key`` -> text, without secrets."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        prefix = f"{name}." if name else ""
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}{key}").items()}
    if re.search(r"passw|secret|credential|(api|access)_?key|(auth|access|api)_?token", name, re.IGNORECASE):
        return {name: "***"}
    return {name: redact(str(list(value) if isinstance(value, tuple) else value))[:LONGEST_VALUE]}


def short(problem: BaseException) -> str:
    """The first line of an error, without secrets."""
    return redact(first_line(problem))[:200]
