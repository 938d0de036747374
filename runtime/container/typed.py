"""JSON as frozen dataclasses, every field checked against its annotation, with its place in what is wrong."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from dsv4c.errors import ArtifactError

T = TypeVar("T")


def one_of(what: str, value: str, allowed: typing.Iterable[str], where: str) -> None:
    """Raise ArtifactError unless the value is allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise ArtifactError(f"{what} {value!r}", where=where, allowed=", ".join(allowed))


def read_value(kind: Any, data: Any, where: str) -> Any:
    """JSON as a value of the type of a field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_class(typing.cast(type[Any], kind), data, where)
    if origin is tuple:
        _expect(isinstance(data, list | tuple), data, "a list", where)
        return tuple(read_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), data, "an object", where)
        return {str(k): read_value(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if origin is types.UnionType:
        allowed = tuple(a for a in args)
        _expect(isinstance(data, allowed) and not isinstance(data, bool), data, str(kind), where)
        return data
    if kind is Any:
        return data
    right = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    _expect(right, data, kind.__name__, where)
    return data


def _read_class(kind: type[T], data: Any, where: str) -> T:
    _expect(isinstance(data, dict), data, "an object", where)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind))}
    needed = {
        n for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }  # fmt: skip
    wrong = sorted((set(data) - set(fields)) | (needed - set(data)))
    if wrong:
        raise ArtifactError(
            f"fields missing or unknown: {', '.join(wrong)}", where=where, allowed=", ".join(fields)
        )
    return kind(**{n: read_value(hints[n], v, f"{where}.{n}") for n, v in data.items()})


def _expect(right: bool, data: Any, what: str, where: str) -> None:
    if not right:
        raise ArtifactError(f"{str(data)[:60]!r} is no {what}", where=where)
