"""A calculator as a tool, without Python's eval: numbers, + - * / // % ** and parentheses."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

LARGEST = 10**15
"""A result beyond it is refused, and with it any power that would take long."""
OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


class Calculator:
    """An environment without a state: every answer begins alike."""

    def reset(self, **row: Any) -> None:
        """Called before each answer, with the columns of its row."""

    def calculate(self, expression: str) -> str:
        """Work out an arithmetic expression.

        Args:
            expression: For example (3 + 4) * 12
        """
        result = _evaluate(ast.parse(expression.strip(), mode="eval").body)
        return str(int(result) if result == int(result) else round(result, 6))


def _evaluate(node: ast.AST) -> int | float:
    """Raises ValueError for anything but arithmetic; the model is told what it says."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        result = node.value
    elif isinstance(node, ast.UnaryOp | ast.BinOp) and type(node.op) in OPERATIONS:
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        values = [_evaluate(part) for part in parts]
        if isinstance(node.op, ast.Pow) and abs(values[1]) > 50:
            raise ValueError("an exponent beyond 50")
        result = OPERATIONS[type(node.op)](*values)
    else:
        raise ValueError(f"not arithmetic: {ast.unparse(node)}")
    if isinstance(result, complex) or not abs(result) <= LARGEST:
        raise ValueError(f"a result beyond {LARGEST}")
    return result
