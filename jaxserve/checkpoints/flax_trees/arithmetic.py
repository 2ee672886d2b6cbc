"""Small whole-number and floating-point expressions in mapping files: `6*block+slot`, `x * sqrt(head_dim)`.

Read with `ast`, never evaluated as Python. Holds no state.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[Any], float]] = {
    "sqrt": math.sqrt,
    "bfloat16": lambda x: float(ml_dtypes.bfloat16(x)),
}
_MAX_LENGTH = 200  # keeps the parser's recursion shallow
_STRIP_ELEMENTS = 4 << 20


def evaluate(text: str, names: Mapping[str, Any]) -> float:
    """Returns the number that `text` is.

    Raises:
        CheckpointError: it is no expression of numbers, `names`, + - * / // %, sqrt() and bfloat16().
    """
    return _number(_parse(text), text, names)


def names_in(text: str) -> set[str]:
    """Returns the names that an expression uses, functions left out."""
    return {node.id for node in ast.walk(_parse(text)) if isinstance(node, ast.Name)} - _FUNCTIONS.keys()


def apply(text: str, x: Any, names: Mapping[str, Any]) -> Any:
    """Returns `x` after one operation such as "x * sqrt(head_dim)", computed in float32 and rounded once to the type of `x`.

    Args:
        text: "x", one of + - * /, and an expression without x.
        x: a numpy or jax array.
    """
    node = _parse(text)
    if not (isinstance(node, ast.BinOp) and isinstance(node.left, ast.Name) and node.left.id == "x"):
        raise CheckpointError(f"value must be one operation on x such as 'x * sqrt(head_dim)', got {text!r}.")
    compute = _OPERATORS[type(node.op)] if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)) else None
    if compute is None:
        raise CheckpointError(f"value may add, subtract, multiply or divide, got {text!r}.")
    number = np.float32(_number(node.right, text, names))
    if not isinstance(x, np.ndarray):
        return compute(x.astype(np.float32), number).astype(x.dtype)
    result = np.empty_like(x)
    rows, out = np.atleast_1d(x), np.atleast_1d(result)
    step = max(1, _STRIP_ELEMENTS // max(1, rows[:1].size))  # no second tensor in float32
    for start in range(0, len(rows), step):
        out[start : start + step] = compute(rows[start : start + step].astype(np.float32), number).astype(x.dtype)
    return result


def _parse(text: str) -> ast.expr:
    try:
        if len(text) > _MAX_LENGTH:
            raise SyntaxError("it is too long")
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(f"{text!r} is no arithmetic expression: {error}.") from error


def _number(node: ast.expr, text: str, names: Mapping[str, Any]) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.Name):
        value = names.get(node.id)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            known = ", ".join(sorted(name for name, number in names.items() if type(number) in (int, float)))
            raise CheckpointError(
                f"{text!r}: {node.id} is no number of the configuration and no capture; known are {known}."
            )
        return value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        try:
            return _OPERATORS[type(node.op)](_number(node.left, text, names), _number(node.right, text, names))
        except ZeroDivisionError as error:
            raise CheckpointError(f"{text!r} divides by zero.") from error
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1 and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None:
            try:
                return function(_number(node.args[0], text, names))
            except ValueError as error:
                raise CheckpointError(f"{text!r}: {error}.") from error
    raise CheckpointError(f"{text!r} may hold numbers, names, + - * / // %, sqrt() and bfloat16() alone.")
