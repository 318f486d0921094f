"""Reads and writes the part of YAML 1.2 that recipes need; the text may be untrusted.

Only mappings, lists and scalars are allowed. Tags are refused, so only plain data can be built. Anchors and
aliases are refused, so a small file cannot expand into a large one. A key may not occur twice. Scalars follow
the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema): ``5e-4`` is a number, ``no`` is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class NotYaml(ValueError):
    """The text is not allowed YAML; the message says what is wrong, and in which line."""


_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise NotYaml(f"anchors and aliases are not allowed (line {event.start_mark.line + 1})")
        if getattr(event, "tag", None) is not None:
            raise NotYaml(f"tags are not allowed (line {event.start_mark.line + 1})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise NotYaml(f"a key must be a word (line {line})")
            if key.value in seen:
                raise NotYaml(f"key {key.value!r} occurs twice (line {line})")
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def construct_yaml_int(self, node: Any) -> int:
        value = int(super().construct_yaml_int(node))
        if abs(value) >= 2**63:
            raise NotYaml(f"a number has more than 64 bits (line {node.start_mark.line + 1})")
        return value


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quotes a text with Unicode line breaks, which YAML would otherwise read back as spaces."""
        breaks = any(character in text for character in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.represent_text)

_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})\\Z"), _first)


def parse_yaml(text: str) -> Any:
    """Returns the data of one YAML document, whose keys are always str. Raises ``NotYaml``."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader, narrowed further
    except yaml.MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        reason = (problem.problem or "cannot be parsed").removeprefix("but ")
        raise NotYaml(f"{reason} (line {line})") from None
    except NotYaml:
        raise
    except RecursionError:
        raise NotYaml("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as problem:
        raise NotYaml(str(problem).splitlines()[0]) from None


def dump_yaml(value: Any) -> str:
    """Returns YAML from which ``parse_yaml`` reads an equal value; the order of keys is kept."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
