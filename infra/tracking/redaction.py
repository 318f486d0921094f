"""Prepares values for logging: URLs without credentials, parameters without secrets, errors as one line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from infra.errors import first_line
from infra.settings.recipe_file import SECRET_NAME

LONGEST_VALUE = 6000
"""MLflow's largest number of characters of a parameter."""


def redact(text: str) -> str:
    """Returns ``text`` without the user names and passwords of URIs and the secrets in their queries."""
    text = re.sub(r"(\b[a-z][a-z0-9+.-]*://)[^/\s]*@", r"\1", text, flags=re.IGNORECASE)
    secret = rf"[^=&\s]*(?:{SECRET_NAME})[^=&\s]*"
    return re.sub(rf"([?&]{secret}=)[^&\s#]*", r"\1***", text, flags=re.IGNORECASE)


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """Returns ``section.key`` -> text for nested mappings and dataclasses, without secrets. ``name``: the
    dotted name of ``value``, which the keys continue."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        prefix = f"{name}." if name else ""
        return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{prefix}{key}").items()}
    if re.search(r"passw|secret|credential|(api|access)_?key|(auth|access|api)_?token", name, re.IGNORECASE):
        return {name: "***"}
    return {name: redact(str(list(value) if isinstance(value, tuple) else value))[:LONGEST_VALUE]}


def short_message(problem: BaseException) -> str:
    """Returns the first line of an error's message, without secrets."""
    return redact(first_line(problem))[:200]
