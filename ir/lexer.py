"""Tokens of IR text and a cursor over them; shared by the parsers of graphs, weights and pipelines."""

from __future__ import annotations

import re

from dsv4c.errors import ParseError

from .attrs import Attr, parse_scalar

_TOKEN = re.compile(
    r'\s*("(?:[^"\\]|\\.)*"|%[\w.]+|@[\w.\-]*|-?(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|inf\b|\d+)|nan\b'
    r"|[A-Za-z_][\w.]*|//|[(){}\[\],:=+*\-])"
)


class Cursor:
    """Reads tokens left to right; every complaint names the line."""

    def __init__(self, text: str, where: str = "") -> None:
        self.where, self.tokens, self.at = where, [], 0
        position, text = 0, text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                raise ParseError(f"cannot read {text[position : position + 20]!r}", where=where)
            self.tokens.append(match.group(1))
            position = match.end()

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        if not token:
            raise ParseError("the line ends too early", where=self.where)
        self.at += 1
        return token

    def eat(self, token: str) -> bool:
        """Take `token` if it comes next."""
        if self.peek() == token:
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.eat(token):
            raise ParseError(f"expected {token!r}, found {self.peek() or 'the end'!r}", where=self.where)

    def done(self) -> None:
        if self.peek():
            raise ParseError(f"{self.peek()!r} is left over", where=self.where)

    def attrs(self) -> dict[str, Attr]:
        """`{name = value, ...}`; empty when no brace comes next."""
        out: dict[str, Attr] = {}
        if not self.eat("{"):
            return out
        while not self.eat("}"):
            name = self.next()
            self.expect("=")
            if name in out:
                raise ParseError(f"attribute {name!r} is given twice", where=self.where)
            out[name] = self.value()
            if self.peek() != "}":
                self.expect(",")
        return out

    def value(self) -> Attr:
        if not self.eat("["):
            return parse_scalar(self.next())
        items: list[int] = []
        while not self.eat("]"):
            item = parse_scalar(self.next())
            if not isinstance(item, int):
                raise ParseError(f"{item!r} is not an integer", where=self.where)
            items.append(item)
            if self.peek() != "]":
                self.expect(",")
        return tuple(items)

    def bracketed(self) -> str:
        """The text of one ``[...]`` group, which must come next."""
        parts: list[str] = []
        depth = 0
        while not parts or depth:
            parts.append(self.next())
            depth += (parts[-1] == "[") - (parts[-1] == "]")
            if len(parts) == 1 and depth == 0:
                raise ParseError(f"expected '[', found {parts[0]!r}", where=self.where)
        return "".join(parts)
