"""Sizes as text: integers, symbols and + - * // min max over them, as launch plans write them down."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from types import CodeType

from dsv4c.errors import ArtifactError

_OPERATIONS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv)


@functools.cache
def _code(text: str) -> tuple[CodeType, frozenset[str]]:
    """The text as a checked expression, and its symbols."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError) as error:
        raise _wrong(text) from error
    symbols: set[str] = set()
    _walk(tree.body, text, symbols)
    return compile(tree, "<size>", "eval"), frozenset(symbols)


def _walk(node: ast.expr, text: str, symbols: set[str]) -> None:
    match node:
        case ast.Constant(value=int()) if not isinstance(node.value, bool):
            return
        case ast.Name(id=name) if name not in ("min", "max"):
            symbols.add(name)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _OPERATIONS):
            _walk(left, text, symbols)
            _walk(right, text, symbols)
        case ast.Call(func=ast.Name(id="min" | "max"), args=args, keywords=[]) if args:
            for arg in args:
                _walk(arg, text, symbols)
        case _:
            raise _wrong(text)


def _wrong(text: str) -> ArtifactError:
    return ArtifactError(
        f"{text[:80]!r} is no size", allowed="integers, symbols, + - * // and min, max, as in (B*T+15)//16"
    )


def symbols(text: str) -> frozenset[str]:
    """The symbols of a size.

    Raises:
        ArtifactError: the text is no size.
    """
    return _code(text)[1]


def size(text: str, known: Mapping[str, int]) -> int:
    """The number that a size stands for.

    Raises:
        ArtifactError: the text is no size, a symbol has no value, or it divides by zero.
    """
    code, names = _code(text)
    missing = names - known.keys()
    if missing:
        raise ArtifactError(f"size {text!r} needs {', '.join(sorted(missing))}", allowed=", ".join(known))
    try:
        return int(eval(code, {"__builtins__": {}, "min": min, "max": max}, dict(known)))
    except ZeroDivisionError as error:
        raise ArtifactError(f"size {text!r} divides by zero") from error
