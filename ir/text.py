"""IR text: printing and parsing of modules and weight expressions. The two are inverses.

One op a line: ``%3 = linear(%1, %2) : f32[B, T, 64] @layers.0.attn.wq_a``.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from dsv4c.errors import IRError, ParseError, unknown

from . import layouts, maps
from . import weights as w
from .attrs import Attr, AttrKind, print_attrs
from .graph import Module, Op, Value
from .levels import Level
from .lexer import Cursor
from .ops import OPS
from .quantised import CONSTRUCTORS as QUANTISED
from .types import TensorType, parse_type
from .weights import WeightExpr

# ---------------------------------------------------------------------------------- printing


def print_weight(x: WeightExpr) -> str:
    args = "(" + ", ".join(print_weight(a) for a in x.args) + ")" if x.args else ""
    return x.op + args + print_attrs(x.attrs).lstrip()


def print_op(op: Op, names: dict[Value, str]) -> str:
    """One line, without indentation. `names` must hold the operands' names and gets the results'."""
    for value in op.results:
        names.setdefault(value, f"%{len(names)}")
    results = ", ".join(names[v] for v in op.results)
    types = ", ".join(str(v.type) for v in op.results)
    loc = f" @{op.loc}" if op.loc else ""
    if op.weight is not None:
        return f"{results} = weight {print_weight(op.weight)} : {types}{loc}"
    operands = ", ".join(names.get(v, "%?") for v in op.operands)
    return f"{results} = {op.name}({operands}){print_attrs(tuple(op.attrs.items()))} : {types}{loc}"


def print_module(module: Module) -> str:
    """The whole module; `parse_module` reads it back."""
    names = {v: f"%{name}" for name, v in module.arguments().items()}
    lines = [f"module {json.dumps(module.name)} level {module.level.value} {{"]
    if module.meta:
        lines.append(f"  meta {json.dumps(module.meta, sort_keys=True)}")
    lines += [f"  input {names[v]} : {v.type}" for v in module.inputs.values()]
    lines += [f"  state {names[v]} : {v.type}" for v in module.states.values()]
    lines += ["  " + print_op(op, names) for op in module.ops]
    lines += [f"  output {name} = {names[v]}" for name, v in module.outputs.items()]
    return "\n".join([*lines, "}", ""])


def around(module: Module, op: Op, lines: int = 3) -> str:
    """The text of `op`, marked, with the ops before and after it; also of a graph that is broken."""
    names = {v: f"%{name}" for name, v in module.arguments().items()}
    ops = module.ops if op in module.ops else [op]
    text = [("> " if one is op else "  ") + print_op(one, names) for one in ops]
    at = ops.index(op)
    return "\n".join(text[max(0, at - lines) : at + lines + 1])


# ----------------------------------------------------------------------------------- parsing

_CONSTRUCTORS: dict[str, Callable[..., WeightExpr]] = {
    "source": w.source, "decode_fp8": w.decode_fp8, "decode_fp4": w.decode_fp4, "cast": w.cast,
    "take": w.take, "rows": w.rows, "concat": lambda *xs: w.concat(xs), "stack": lambda *xs: w.stack(xs),
    "transpose": w.transpose, "reshape": w.reshape, "panel": w.panel, "pair_rows": w.pair_rows,
    "reroute": w.reroute, "rope_frequencies": w.rope_frequencies, **QUANTISED,
    "lane_words": layouts.lane_words, "row_scales": layouts.row_scales,
    "unpacked": layouts.unpacked,
    "scale_columns": maps.scale_columns, "evaluated": maps.evaluated,
}  # fmt: skip

_TYPED = {"name": AttrKind.STR, "dtype": AttrKind.DTYPE, "shape": AttrKind.INTS, "block": AttrKind.INTS,
          "experts": AttrKind.INT, "choices": AttrKind.INTS, "scheme": AttrKind.STR, "search": AttrKind.BOOL,
          "old": AttrKind.STR, "new": AttrKind.STR, "of": AttrKind.STR}  # fmt: skip
"""Attributes of weight operations that no arithmetic checks."""


def parse_weight(cursor: Cursor) -> WeightExpr:
    """A weight expression at the cursor."""
    name = cursor.next()
    if name not in _CONSTRUCTORS:
        raise unknown("weight operation", name, _CONSTRUCTORS, ParseError, cursor.where)
    args: list[WeightExpr] = []
    if cursor.eat("("):
        while not cursor.eat(")"):
            args.append(parse_weight(cursor))
            if cursor.peek() != ")":
                cursor.expect(",")
    attrs = cursor.attrs()
    for key, kind in _TYPED.items():
        if key in attrs and not kind.admits(attrs[key]):
            what = f"{name}.{key} = {attrs[key]!r} is mistyped"
            raise ParseError(what, where=cursor.where, allowed=kind.value)
    try:
        return _CONSTRUCTORS[name](*args, **attrs)
    except (TypeError, IndexError) as error:
        raise ParseError(f"bad operands of weight operation {name}: {error}", where=cursor.where) from None


class _Parser:
    def __init__(self, text: str, where: str) -> None:
        self.lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1)]
        self.lines = [(n, line) for n, line in self.lines if line and not line.startswith("//")]
        self.where = where
        self.values: dict[str, Value] = {}

    def at(self, number: int) -> str:
        return f"{self.where}:{number}"

    def module(self) -> Module:
        if not self.lines:
            raise ParseError("no module", where=self.where)
        number, head = self.lines[0]
        cursor = Cursor(head, self.at(number))
        cursor.expect("module")
        module = Module(json.loads(cursor.next()))
        cursor.expect("level")
        level = cursor.next()
        if level not in Level.__members__:
            raise unknown("level", level, Level.__members__, ParseError, self.at(number))
        module.level = Level[level]
        cursor.expect("{")
        if self.lines[-1][1] != "}":
            raise ParseError("the module is not closed by '}'", where=self.at(self.lines[-1][0]))
        for number, line in self.lines[1:-1]:
            self.line(module, number, line)
        return module

    def line(self, module: Module, number: int, line: str) -> None:
        """One line; every complaint about it names its number."""
        try:
            self.statement(module, number, line)
        except ParseError as error:
            where = error.where or self.at(number)
            raise ParseError(error.what, where=where, allowed=error.allowed, hint=error.hint) from None
        except IRError as error:
            raise ParseError(f"{error.where}: {error.what}", where=self.at(number)) from None
        except ValueError as error:
            raise ParseError(f"malformed line: {error}", where=self.at(number)) from None

    def statement(self, module: Module, number: int, line: str) -> None:
        word = line.split(None, 1)[0]
        if word == "meta":
            module.meta = json.loads(line.split(None, 1)[1])
        elif word in ("input", "state"):
            name, colon, type_ = line.removeprefix(word).partition(":")
            if not colon:
                raise ParseError(f"{word} needs a name and a type", allowed=f"{word} %name : dtype[dims]")
            value = self.define(
                name.strip(), Value(parse_type(type_), None, name.strip()[1:]), self.at(number)
            )
            (module.inputs if word == "input" else module.states)[value.name] = value
        elif word == "output":
            name, _, value_name = (s.strip() for s in line.removeprefix(word).partition("="))
            if not name or not value_name or name in module.outputs:
                raise ParseError(f"{line!r} names no new output", allowed="output name = %value")
            module.outputs[name] = self.use(value_name, self.at(number))
        else:
            module.ops.append(self.op(Cursor(line, self.at(number))))

    def define(self, name: str, value: Value, where: str) -> Value:
        if not name.startswith("%") or name in self.values:
            raise ParseError(f"{name} is no new value name", where=where)
        self.values[name] = value
        return value

    def use(self, name: str, where: str) -> Value:
        if name not in self.values:
            raise ParseError(f"value {name} is not defined", where=where)
        return self.values[name]

    def op(self, cursor: Cursor) -> Op:
        names = [cursor.next()]
        while cursor.eat(","):
            names.append(cursor.next())
        cursor.expect("=")
        word = cursor.next()
        if word not in OPS:
            raise unknown("op", word, OPS, ParseError, cursor.where)
        operands: list[Value] = []
        attrs: dict[str, Attr] = {}
        expr = parse_weight(cursor) if word == "weight" else None
        if expr is None:
            cursor.expect("(")
            while not cursor.eat(")"):
                operands.append(self.use(cursor.next(), cursor.where))
                if cursor.peek() != ")":
                    cursor.expect(",")
            attrs = cursor.attrs()
        cursor.expect(":")
        types = self.types(cursor)
        loc = cursor.next()[1:] if cursor.peek().startswith("@") else ""
        cursor.done()
        try:
            op = Op(OPS[word], operands, attrs, loc, expr)
        except IRError as error:
            raise ParseError(error.what, where=cursor.where, allowed=error.allowed) from None
        found = [v.type for v in op.results]
        if found != types:
            raise ParseError(f"{word} gives {_list(found)}, the text says {_list(types)}", where=cursor.where)
        if len(names) != len(op.results):
            what = f"{word} gives {len(op.results)} results, the text names {len(names)}"
            raise ParseError(what, where=cursor.where)
        for name, value in zip(names, op.results, strict=True):
            self.define(name, value, cursor.where)
        return op

    def types(self, cursor: Cursor) -> list[TensorType]:
        out = []
        while True:
            out.append(parse_type(cursor.next() + cursor.bracketed()))
            if not cursor.eat(","):
                return out


def _list(types: list[TensorType]) -> str:
    return ", ".join(str(t) for t in types)


def parse_module(text: str, where: str = "<text>") -> Module:
    """The inverse of `print_module`.

    Raises:
        ParseError: with file and line, for unknown ops, undefined values, and types that disagree
            with the declaration.
    """
    try:
        return _Parser(text, where).module()
    except (json.JSONDecodeError, ValueError) as error:
        raise ParseError(f"malformed text: {error}", where=where) from None
