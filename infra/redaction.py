"""Secrets: how they are found in a recipe, and removed from messages and from what is logged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from infra.errors import first_line

SECRET_PARAMETER = "token|secret|passw|key|sig|credential"
"""Regular expression that is found, in any case, in the name of a URL parameter that is a secret."""
SECRET_SETTING = "passw|secret|credential|(api|access)_?key|(auth|access|api)_?token"
"""The same for the dotted name of a setting."""
CONTAINER_SCHEMES = ("abfs", "abfss")
"""Azure's URLs, in which the name before @ is a container and not a user."""
LONGEST_VALUE = 6000
"""MLflow's largest number of characters of a parameter."""


def secret_in(text: Any) -> str | None:
    """Returns a description of the secret in a URL: a password, a user name, or a parameter whose name
    suggests a secret. None if there is none. The user of a database (postgresql://user@host) and an Azure
    container (abfs://name@account) are no secrets."""
    if not isinstance(text, str) or "://" not in text:
        return None
    try:
        parts = urlsplit(text)
        if parts.password:
            return "a password"
        names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    except ValueError:
        return None
    if parts.username and parts.scheme.lower() in ("http", "https"):
        return "a user name or token before the host"
    secret = next((name for name in names if re.search(SECRET_PARAMETER, name, re.IGNORECASE)), None)
    return secret and f"a token or signature in its parameter {secret}"


def without_secrets(path: str) -> str:
    """Returns a path for messages: a URL loses its user name, password and query (signatures, tokens)."""
    head, separator, rest = path.partition("://")
    if not separator or not head.isalnum():
        return path
    host, slash, key = rest.partition("?")[0].partition("/")
    keeps_user = head.lower() in CONTAINER_SCHEMES and ":" not in host
    return f"{head}://{host if keeps_user else host.rpartition('@')[2]}{slash}{key}"


def redact(text: str) -> str:
    """Returns ``text`` without the user names and passwords of URLs and the secrets in their queries."""
    text = re.sub(r"(\b[a-z][a-z0-9+.-]*://)[^/\s]*@", r"\1", text, flags=re.IGNORECASE)
    secret = rf"[^=&\s]*(?:{SECRET_PARAMETER})[^=&\s]*"
    return re.sub(rf"([?&]{secret}=)[^&\s#]*", r"\1***", text, flags=re.IGNORECASE)


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """Returns ``section.key`` -> text for nested mappings and dataclasses, without secrets. ``name``: the
    dotted name of ``value``, which the keys continue."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        prefix = f"{name}." if name else ""
        return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{prefix}{key}").items()}
    if re.search(SECRET_SETTING, name, re.IGNORECASE):
        return {name: "***"}
    return {name: redact(str(list(value) if isinstance(value, tuple) else value))[:LONGEST_VALUE]}


def short_message(problem: BaseException) -> str:
    """Returns the first line of an error's message, without secrets."""
    return redact(first_line(problem))[:200]
