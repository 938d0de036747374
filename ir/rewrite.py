"""Pattern rewriting: a rule is a pattern, a check, and a rewrite; one that does not fire says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .attrs import Attr
from .graph import Builder, Module, Op, Value

Bindings = dict[str, Value]


@dataclass(frozen=True)
class Pat:
    """A pattern over the producers of a value.

    Attributes:
        op: the op's name, or "" for any value.
        operands: patterns of its operands; None leaves them free.
        bind: name under which the matched value is handed to check and rewrite.
        attrs: attributes that must have these values.
        single_use: the value may have no reader outside the match (so that it can be removed).
    """

    op: str = ""
    operands: tuple[Pat, ...] | None = None
    bind: str = ""
    attrs: tuple[tuple[str, Attr], ...] = ()
    single_use: bool = False


def any_(bind: str = "") -> Pat:
    return Pat(bind=bind)


@dataclass(frozen=True)
class Rule:
    """A rewrite of the op that makes the root value.

    Attributes:
        check: returns "" when the rewrite is sound, else the reason why not.
        rewrite: builds the replacement of the root's result.
    """

    name: str
    pattern: Pat
    rewrite: Callable[[Builder, Bindings, Op], Value]
    check: Callable[[Bindings, Op], str] = lambda bindings, op: ""


@dataclass(frozen=True)
class Outcome:
    """What became of a rule at one op: bindings, or how deep the match went and why it stopped."""

    bindings: Bindings | None
    depth: int
    reason: str


def match(pattern: Pat, value: Value, bound: Mapping[str, Value] | None = None) -> Outcome:
    """Match `pattern` against the ops that make `value`."""
    bindings: Bindings = dict(bound or {})
    depth = [0]
    reason = _match(pattern, value, bindings, depth, root=True)
    return Outcome(None if reason else bindings, depth[0], reason)


def _match(pattern: Pat, value: Value, bindings: Bindings, depth: list[int], root: bool) -> str:
    if pattern.bind and bindings.setdefault(pattern.bind, value) is not value:
        return f"{pattern.bind!r} would be two different values"
    if not pattern.op:
        return ""
    op = value.producer
    if op is None or op.name != pattern.op:
        return f"expected {pattern.op}, found {'an argument' if op is None else op.name}"
    for name, wanted in pattern.attrs:
        if op.attrs.get(name) != wanted:
            return f"{op.name}.{name} is {op.attrs.get(name)!r}, not {wanted!r}"
    depth[0] += 1
    if pattern.single_use and not root and len(value.uses) > 1:
        return f"{op.name} @{op.loc} has {len(value.uses)} readers"
    if pattern.operands is None:
        return ""
    if len(pattern.operands) != len(op.operands):
        return f"{op.name} has {len(op.operands)} operands, the pattern {len(pattern.operands)}"
    for sub, operand in zip(pattern.operands, op.operands, strict=True):
        reason = _match(sub, operand, bindings, depth, root=False)
        if reason:
            return reason
    return ""


def try_rule(rule: Rule, op: Op) -> Outcome:
    """Match and check `rule` at `op`, changing nothing."""
    if len(op.results) != 1:
        return Outcome(None, 0, f"{op.name} has {len(op.results)} results")
    outcome = match(rule.pattern, op.result)
    if outcome.bindings is None:
        return outcome
    reason = rule.check(outcome.bindings, op)
    return Outcome(None if reason else outcome.bindings, outcome.depth, reason)


def apply_rules(module: Module, rules: tuple[Rule, ...]) -> int:
    """Apply every rule once over the module, in op order; returns how often one fired.

    Ops that lose their last reader stay; dead code elimination removes them.
    """
    fired, old, scratch = 0, module.ops, []
    for op in old:
        for rule in rules:
            outcome = try_rule(rule, op)
            if outcome.bindings is None:
                continue
            builder = Builder(Module(module.name))
            builder.loc = op.loc
            replacement = rule.rewrite(builder, outcome.bindings, op)
            scratch += builder.module.ops
            op.result.replace_with(replacement)
            for name, value in module.outputs.items():
                if value is op.result:
                    module.outputs[name] = replacement
            fired += 1
            break
        scratch.append(op)
    module.ops = scratch
    return fired


def near_misses(module: Module, rules: tuple[Rule, ...]) -> list[tuple[Op, str]]:
    """The ops at which no rule fires though two ops of a pattern match, or its only one; and what stopped it.

    Of several rules at one op the reason is of the one that matched most.
    """
    missed = []
    for op in module.ops:
        outcomes = [(rule, try_rule(rule, op)) for rule in rules]
        if any(outcome.bindings is not None for _, outcome in outcomes):
            continue
        near = [o for rule, o in outcomes if o.depth >= min(2, _size(rule.pattern))]
        if near:
            missed.append((op, max(near, key=lambda outcome: outcome.depth).reason))
    return missed


def _size(pattern: Pat) -> int:
    """How many ops a pattern names."""
    return bool(pattern.op) + sum(map(_size, pattern.operands or ()))


def explain(module: Module, rule: Rule) -> str:
    """Why `rule` fires nowhere in `module`: the deepest partial match and what stopped it; "" if it fires."""
    best: tuple[int, Op | None, str] = (-1, None, "the module has no ops")
    for op in module.ops:
        outcome = try_rule(rule, op)
        if outcome.bindings is not None:
            return ""
        if outcome.depth > best[0]:
            best = (outcome.depth, op, outcome.reason)
    where = f" at {best[1].name} @{best[1].loc}" if best[1] else ""
    return f"{rule.name}: matched {max(best[0], 0)} op(s){where}, then {best[2]}"
