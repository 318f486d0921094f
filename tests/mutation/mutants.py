"""Faults that are put into a module's source, one at a time."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A module with one fault."""

    number: int
    """Of the line."""
    key: tuple[str, str]
    """The fault with the code that it changes, and the line as it was."""
    source: str
    """The whole module with the fault."""

    def __str__(self) -> str:
        return f"{self.number}: {self.key[0]}: {self.key[1]}"


def mutants(source: str) -> Iterator[Mutant]:
    """Every fault of ``_FAULTS`` at every place, except in ``_without_effect``."""
    tree, lines = ast.parse(source), source.splitlines()
    left_out = {id(node) for part in _without_effect(tree) for node in ast.walk(part)}
    for node in [node for node in ast.walk(tree) if id(node) not in left_out]:
        code, before = ast.unparse(node).partition("\n")[0], vars(node)
        part = node.ifs[0] if isinstance(node, ast.comprehension) and node.ifs else node
        number = getattr(part, "lineno", 1)
        for fault, put in _FAULTS.items():
            node.__dict__ = {name: copy.copy(value) for name, value in before.items()}
            if put(node):
                text = ast.unparse(ast.fix_missing_locations(tree))
                yield Mutant(number, (f"{fault} {code}", lines[number - 1].strip()), text)
        node.__dict__ = before


def _without_effect(tree: ast.AST) -> Iterator[ast.AST]:
    """Annotations and imports for them, docstrings, texts for people (f-strings, ``UserError(...)``), and
    ``strict`` of ``zip``, because the lengths that it checks are equal."""
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if isinstance(getattr(node, field, None), ast.AST):
                yield getattr(node, field)
        documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        error = isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError"
        check = isinstance(node, ast.keyword) and node.arg == "strict"
        types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if documentation or error or check or types or isinstance(node, ast.JoinedStr):
            yield node


def _comparison(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        node.ops[0] = _COMPARISONS[type(node.ops[0])]()
    return isinstance(node, ast.Compare)


def _arithmetic(node: ast.AST) -> bool:
    if not isinstance(node, ast.BinOp) or type(node.op) not in _ARITHMETIC:
        return False
    node.op = _ARITHMETIC[type(node.op)]()
    return True


def _and_or(node: ast.AST) -> bool:
    if isinstance(node, ast.BoolOp):
        node.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
    return isinstance(node, ast.BoolOp)


def _sign(node: ast.AST) -> bool:
    """``-x`` becomes ``+x``, and ``not x`` becomes ``not not x``."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node.op = ast.UAdd()
        return True
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
        return True
    return False


def _condition(node: ast.AST) -> bool:
    """Negates a condition, also that of a comprehension."""
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return True
    if isinstance(node, ast.comprehension) and node.ifs:
        node.ifs[0] = ast.UnaryOp(ast.Not(), node.ifs[0])
        return True
    return False


def _constant(node: ast.AST) -> bool:
    """Another truth, a larger number or a longer text."""
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float, bool, str):
        return False
    if isinstance(node.value, bool):
        node.value = not node.value
    else:
        node.value += "X" if isinstance(node.value, str) else 1  # type: ignore[operator]
    return True


def _result(node: ast.AST) -> bool:
    if not isinstance(node, ast.Return) or node.value is None or isinstance(node.value, ast.Constant):
        return False
    node.value = ast.Constant(None)
    return True


_FAULTS: dict[str, Callable[[ast.AST], bool]] = {
    "comparison": _comparison,
    "arithmetic": _arithmetic,
    "and/or": _and_or,
    "sign": _sign,
    "condition": _condition,
    "constant": _constant,
    "result": _result,
}
"""Name -> puts the fault into a node; False where the node has no place for it."""
