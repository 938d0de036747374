"""Symbolic dimensions: integers, named symbols, and floor arithmetic over them.

A dimension is an `int` or a `Dim` expression such as ``ctx//4`` or ``(T + 3)//4``. Equality is
structural after constant folding; there is no solver.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsv4c.errors import EvalError, ParseError


@dataclass(frozen=True)
class Dim:
    """A symbol (`op == "sym"`, `name`) or `lhs op rhs` with op in + - * //."""

    op: str
    name: str = ""
    lhs: Dim | int = 0
    rhs: Dim | int = 0

    def __add__(self, other: Dim | int) -> Dim | int:
        return _make("+", self, other)

    def __sub__(self, other: Dim | int) -> Dim | int:
        return _make("-", self, other)

    def __mul__(self, other: Dim | int) -> Dim | int:
        return _make("*", self, other)

    def __floordiv__(self, other: Dim | int) -> Dim | int:
        return _make("//", self, other)

    def __str__(self) -> str:
        if self.op == "sym":
            return self.name
        sides = [f"({s})" if isinstance(s, Dim) and s.op != "sym" else str(s) for s in (self.lhs, self.rhs)]
        return f"{sides[0]}{self.op}{sides[1]}"

    def symbols(self) -> Iterator[str]:
        """The names in the expression, left to right."""
        if self.op == "sym":
            yield self.name
        for side in (self.lhs, self.rhs):
            if isinstance(side, Dim):
                yield from side.symbols()


def sym(name: str) -> Dim:
    return Dim("sym", name)


def _apply(op: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "//": a // b if b else 0}[op]


def _make(op: str, lhs: Dim | int, rhs: Dim | int) -> Dim | int:
    if isinstance(lhs, int) and isinstance(rhs, int):
        return _apply(op, lhs, rhs)
    neutral = {"+": 0, "-": 0, "*": 1, "//": 1}[op]
    return lhs if rhs == neutral else Dim(op, "", lhs, rhs)


def evaluate(dim: Dim | int, env: Mapping[str, int]) -> int:
    """The number a dimension stands for.

    Raises:
        EvalError: a symbol has no value in `env`.
    """
    if isinstance(dim, int):
        return dim
    if dim.op == "sym":
        if dim.name not in env:
            raise EvalError(f"dimension {dim.name!r} has no value", allowed=", ".join(sorted(env)))
        return env[dim.name]
    return _apply(dim.op, evaluate(dim.lhs, env), evaluate(dim.rhs, env))


def substitute(dim: Dim | int, env: Mapping[str, int]) -> Dim | int:
    """The dimension with the symbols of `env` replaced by their numbers; others stay."""
    if isinstance(dim, int):
        return dim
    if dim.op == "sym":
        return env.get(dim.name, dim)
    return _make(dim.op, substitute(dim.lhs, env), substitute(dim.rhs, env))


_TOKEN = re.compile(r"\s*(\d+|[A-Za-z_][\w.]*|//|[+\-*()])")


def parse_dim(text: str) -> Dim | int:
    """The inverse of `str`: ``4``, ``T``, ``(T + 3)//4``.

    Raises:
        ParseError: the text is not a dimension.
    """
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if not match:
            raise ParseError(f"{text!r} is not a dimension")
        tokens.append(match.group(1))
        at = match.end()
    result, rest = _parse_chain(tokens)
    if rest:
        raise ParseError(f"{text!r} is not a dimension: {rest[0]!r} is left over")
    return result


def _parse_chain(tokens: list[str]) -> tuple[Dim | int, list[str]]:
    value, rest = _parse_atom(tokens)
    first = rest[0] if rest else ""
    while rest and rest[0] in ("+", "-", "*", "//"):
        if (rest[0] in "+-") != (first in "+-"):
            raise ParseError(f"{first!r} and {rest[0]!r} need parentheses between them", allowed="(T+3)//4")
        rhs, after = _parse_atom(rest[1:])
        value, rest = _make(rest[0], value, rhs), after
    return value, rest


def _parse_atom(tokens: list[str]) -> tuple[Dim | int, list[str]]:
    if not tokens:
        raise ParseError("a dimension ends too early")
    head, rest = tokens[0], tokens[1:]
    if head == "(":
        value, rest = _parse_chain(rest)
        if rest[:1] != [")"]:
            raise ParseError("a dimension lacks a closing parenthesis")
        return value, rest[1:]
    if head.isdigit():
        return int(head), rest
    if re.fullmatch(r"[A-Za-z_][\w.]*", head):
        return sym(head), rest
    raise ParseError(f"{head!r} is not a dimension")
