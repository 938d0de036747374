"""Typed attributes: the values an op may carry, and their one spelling in text."""

from __future__ import annotations

import enum
import json

from dsv4c.errors import ParseError

from .dtypes import DType

Attr = int | float | bool | str | DType | tuple[int, ...]
"""What an attribute may be."""


class AttrKind(enum.Enum):
    """The declared type of an attribute."""

    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    STR = "str"
    DTYPE = "dtype"
    INTS = "ints"

    def admits(self, value: object) -> bool:
        match self:
            case AttrKind.INT:
                return isinstance(value, int) and not isinstance(value, bool)
            case AttrKind.FLOAT:
                return isinstance(value, float)
            case AttrKind.BOOL:
                return isinstance(value, bool)
            case AttrKind.STR:
                return isinstance(value, str)
            case AttrKind.DTYPE:
                return isinstance(value, DType)
            case AttrKind.INTS:
                return isinstance(value, tuple) and all(type(v) is int for v in value)


def print_attr(value: Attr) -> str:
    """One spelling per value: floats always with a point or exponent, strings as JSON, lists in brackets."""
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            return repr(value)
        case int():
            return str(value)
        case str():
            return json.dumps(value)
        case DType():
            return value.value
        case tuple():
            return "[" + ", ".join(str(v) for v in value) + "]"


def print_attrs(attrs: tuple[tuple[str, Attr], ...]) -> str:
    """` {name = value, ...}`, or nothing when there are none."""
    return " {" + ", ".join(f"{k} = {print_attr(v)}" for k, v in attrs) + "}" if attrs else ""


_WORDS: dict[str, Attr] = {"true": True, "false": False, **{d.value: d for d in DType}}


def parse_scalar(token: str) -> Attr:
    """The value of one token of IR text.

    Raises:
        ParseError: the token is none of the spellings of `print_attr`.
    """
    if token in _WORDS:
        return _WORDS[token]
    if token.startswith('"'):
        return str(json.loads(token))
    try:
        return int(token)
    except ValueError:
        pass
    try:
        return float(token)
    except ValueError:
        raise ParseError(
            f"{token!r} is not an attribute value", allowed="a number, string, bool or dtype"
        ) from None
