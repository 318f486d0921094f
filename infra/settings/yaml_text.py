"""The part of YAML 1.2 a recipe needs, read from untrusted text.

Plain mappings, lists and scalars only: no tags, so nothing but plain data can be built; no anchors
and aliases, so a small file cannot unfold into a large one; no key twice. Scalars follow the YAML 1.2
core schema (https://yaml.org/spec/1.2.2/#103-core-schema), so that ``5e-4`` is a number and ``no`` is a word.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class NotYaml(ValueError):
    """One sentence: what in the text is not allowed, and in which line."""


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
            raise NotYaml(f"a number beyond 64 bits (line {node.start_mark.line + 1})")
        return value


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Unicode's line breaks are escaped: written plain they would be read back folded."""
        breaks = any(character in text for character in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.represent_text)

_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})\\Z"), _first)


def parse_yaml(text: str) -> Any:
    """Plain data of one YAML document (keys are always str); raises ``NotYaml``."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader, narrowed further
    except yaml.MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        what = (problem.problem or "cannot be parsed").removeprefix("but ")
        raise NotYaml(f"{what} (line {line})") from None
    except NotYaml:
        raise
    except RecursionError:
        raise NotYaml("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as problem:
        raise NotYaml(str(problem).splitlines()[0]) from None


def dump_yaml(value: Any) -> str:
    """The inverse of ``parse_yaml``, keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
