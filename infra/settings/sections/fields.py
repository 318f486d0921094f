"""Functions with which the sections declare and check their settings, and shared types and limits."""

from __future__ import annotations

import re
from dataclasses import MISSING, field
from typing import Any, Literal

TEMPERATURES = (0.1, 1000.0)
"""Smallest and largest temperature that the number formats allow. Logits have a relative error of 2^-9 for a
bfloat16 teacher (0.03 near 16) and of 2^-11 for a float32 teacher stored in float16 (0.008). Below T = 0.1
these errors change a probability by a third, or by 8 %. Above T = 1000 teacher and student are both almost
uniform, and the gradient, their difference, is not much larger than float32's rounding error."""
TEMPERATURE_RANGE = "{:g} to {:g}".format(*TEMPERATURES)

Precision = Literal["bfloat16", "float16", "float32"]


def fingerprinted(default: Any = MISSING) -> Any:
    """Declares a setting that changes the result, and so is part of the fingerprint."""
    return field(default=default, metadata={"fingerprinted": True})


def added(default: Any) -> Any:
    """Declares a fingerprinted setting that a later version introduced. It is left out of the fingerprint if
    it has its default, so that earlier stores and students stay usable. The default must mean what earlier
    versions did, and must never change."""
    return field(default=default, metadata={"fingerprinted": True, "added": True})


def unfingerprinted(default: Any = MISSING, factory: Any = MISSING) -> Any:
    """Declares a setting that changes only speed, location or appearance. ``factory`` creates the default of
    a setting that is a mapping; such a setting is not part of the hash."""
    hashed = None if factory is MISSING else False
    return field(default=default, default_factory=factory, hash=hashed, metadata={"fingerprinted": False})


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def is_name(text: str) -> bool:
    """Returns whether the text can be the name of a recipe, student, task or model, and so of a folder."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text) is not None


def grid_values(value: Any) -> tuple[Any, ...]:
    """Returns the values of a setting that may be a grid: the items of a list, or the single value."""
    return value if isinstance(value, tuple) else (value,)


def check_at_least(section: Any, lowest: int, *names: str) -> None:
    """Raises ValueError if one of these settings, or an item of its list, is below ``lowest``."""
    for name in names:
        for value in grid_values(getattr(section, name)):
            require(value is None or value >= lowest, f"{name}: must be >= {lowest}, not {value}")


def check_positive(section: Any, *names: str) -> None:
    """Raises ValueError if one of these settings, or an item of its list, is not above 0."""
    for name in names:
        for value in grid_values(getattr(section, name)):
            require(value is None or value > 0, f"{name}: must be > 0, not {value}")


def is_temperature(value: float) -> bool:
    return TEMPERATURES[0] <= value <= TEMPERATURES[1]
