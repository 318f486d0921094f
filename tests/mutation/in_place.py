"""Another source for a module that is loaded already, so that no process has to import anything again."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any


def put(name: str, source: str) -> None:
    """Runs ``source`` in the module; whoever has imported something from it has the new one, too."""
    module = sys.modules[name]
    before = dict(vars(module))
    exec(compile(source, str(module.__file__), "exec"), vars(module))
    for key, old in before.items():
        new = vars(module)[key]
        if new is old or key.startswith("__"):
            continue
        if isinstance(old, (FunctionType, type)) and old.__module__ == name:
            _change(old, new)
            vars(module)[key] = old
        else:
            for other in [one for one in sys.modules.values() if getattr(one, key, None) is old]:
                setattr(other, key, new)


def _change(old: Any, new: Any) -> None:
    """A function gets the code of ``new``, a class the attributes, and no others."""
    if isinstance(old, FunctionType):
        old.__code__, old.__defaults__, old.__kwdefaults__ = (
            new.__code__,
            new.__defaults__,
            new.__kwdefaults__,
        )
        return
    for name in vars(old).keys() - vars(new).keys():
        delattr(old, name)
    for name, value in vars(new).items():
        if name not in ("__dict__", "__weakref__"):
            setattr(old, name, value)
