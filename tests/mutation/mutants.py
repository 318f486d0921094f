"""Makes variants of a module's source, each with one fault."""

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

    line: int
    fault: str
    code: str
    """The original expression or statement."""
    source: str
    """Source of the module with the fault."""

    def __str__(self) -> str:
        return f"{self.line}: {self.fault}: {self.code}"


def mutants(source: str) -> Iterator[Mutant]:
    """Yields ``source`` with every fault of ``_FAULTS`` at every node of its syntax tree. Annotations,
    f-strings and ``UserError(...)`` get no faults."""
    tree = ast.parse(source)
    left_out = {id(node) for part in _without_effect(tree) for node in ast.walk(part)}
    for place, node in enumerate(ast.walk(tree)):
        for fault, put in _FAULTS.items():
            changed = copy.deepcopy(tree)
            (there,) = [one for number, one in enumerate(ast.walk(changed)) if number == place]
            if id(node) not in left_out and put(there):
                code = ast.unparse(node).partition("\n")[0]
                text = ast.unparse(ast.fix_missing_locations(changed))
                yield Mutant(getattr(node, "lineno", 0), fault, code, text)


def _without_effect(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if isinstance(getattr(node, field, None), ast.AST):
                yield getattr(node, field)
        if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError"
        ):
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
    """Changes ``-x`` to ``+x``, and ``not x`` to ``not not x``."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node.op = ast.UAdd()
        return True
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
        return True
    return False


def _condition(node: ast.AST) -> bool:
    if isinstance(node, (ast.If, ast.IfExp)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    return isinstance(node, (ast.If, ast.IfExp))


def _constant(node: ast.AST) -> bool:
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float, bool):
        return False
    node.value = not node.value if isinstance(node.value, bool) else node.value + 1  # type: ignore[operator]
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
"""Name of a fault -> function that puts it into a node, or returns False if it does not fit the node."""
