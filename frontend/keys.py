"""Reading one JSON object key by key, with errors that name the key and what was allowed."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4c.errors import ConfigError

REQUIRED: Any = object()


def is_number(value: Any) -> bool:
    """A finite JSON number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class Keys:
    """One JSON object and where it stands. Each reading method takes one key; null counts as absent.

    Attributes:
        names: key -> what the file calls it, where that is something else; for errors.

    Raises:
        ConfigError: a key without a default is absent, or a value is not what its method allows.
    """

    raw: dict[str, object]
    where: str
    names: Mapping[str, str] = field(default_factory=dict)

    def error(self, key: str, found: str, allowed: str) -> ConfigError:
        return ConfigError(f"key {self._named(key)!r} is {found}", where=self.where, allowed=allowed)

    def missing(self, key: str, allowed: str) -> ConfigError:
        return ConfigError(f"key {self._named(key)!r} is missing", where=self.where, allowed=allowed)

    def _named(self, key: str) -> str:
        return self.names.get(key, key)

    def unknown(self, key: str, known: Iterable[str]) -> ConfigError:
        near = difflib.get_close_matches(key, sorted(map(self._named, known)), n=1, cutoff=0.5)
        hint = f"the nearest known key is {near[0]!r}" if near else ""
        allowed = "keys of a DeepSeek-V4 configuration; an unknown one could change the result"
        return ConfigError(f"unknown key {key!r}", where=self.where, allowed=allowed, hint=hint)

    def get(self, key: str, ok: Callable[[Any], bool], allowed: str, default: Any = REQUIRED) -> Any:
        """The value if it passes `ok`; the default, unchecked, if the key is absent."""
        value = self.raw.get(key)
        if value is None:
            if default is REQUIRED:
                raise self.missing(key, allowed)
            return default
        if not ok(value):
            raise self.error(key, repr(value), allowed)
        return value

    def integer(self, key: str, default: int = REQUIRED, *, at_least: int = 1) -> int:
        allowed = f"an integer of at least {at_least}"
        return int(self.get(key, lambda v: type(v) is int and v >= at_least, allowed, default))

    def token(self, key: str) -> int | None:
        return None if self.raw.get(key) is None else self.integer(key, at_least=0)

    def number(self, key: str, default: float = REQUIRED, *, at_least: float = 0.0) -> float:
        """Above zero and not below `at_least`."""
        allowed = f"a finite number of at least {at_least:g}" if at_least else "a finite number above 0"
        return float(self.get(key, lambda v: is_number(v) and v > 0 and v >= at_least, allowed, default))

    def integers(self, key: str, default: Any = REQUIRED, *, at_least: int = 0) -> tuple[int, ...]:
        allowed = f"an integer of at least {at_least}"
        value = self.get(key, lambda v: isinstance(v, list), f"a list, each {allowed}", default)
        return self._each(key, value, lambda v: type(v) is int and v >= at_least, allowed)

    def choice(self, key: str, options: tuple[str, ...], default: Any = REQUIRED) -> str | None:
        found: str | None = self.get(key, lambda v: v in options, ", ".join(options), default)
        return found

    def choices(self, key: str, options: tuple[str, ...], count: int) -> tuple[str, ...]:
        value = self.get(key, lambda v: isinstance(v, list), f"a list of {count} names")
        if len(value) != count:
            raise self.error(key, f"a list of {len(value)}", f"{count} entries (num_hidden_layers)")
        return self._each(key, value, lambda v: v in options, ", ".join(options))

    def nested(self, key: str, *, required: bool = False) -> Keys:
        value = self.get(key, lambda v: isinstance(v, dict), "an object", REQUIRED if required else {})
        return Keys(value, f"{self.where}: {key}", self.names)

    def _each(
        self, key: str, values: Iterable[Any], ok: Callable[[Any], bool], allowed: str
    ) -> tuple[Any, ...]:
        found = tuple(values)
        for i, item in enumerate(found):
            if not ok(item):
                raise self.error(f"{key}[{i}]", repr(item), allowed)
        return found
