"""The verifier: SSA order, types by declaration, use lists, linear state, and the level's table."""

from __future__ import annotations

from dsv4c.errors import IRError, VerifyError

from .graph import Module, Op, Value
from .levels import allows


def verify(module: Module, target_ops: frozenset[str] | None = None) -> None:
    """Check every invariant of the graph.

    Args:
        target_ops: the legal ops of a target, for modules at level TARGET.

    Raises:
        VerifyError: naming the op, its location and what is wrong.
    """
    defined: set[Value] = set(module.arguments().values())
    dead: dict[Value, Op] = {}
    for op in module.ops:
        _check_op(op, module, target_ops, defined, dead)
        defined.update(op.results)
    _check_outputs(module, defined, dead)
    _check_uses(module)


def _fail(op: Op, what: str, allowed: str = "") -> None:
    error = VerifyError(f"{op.name}: {what}", where=op.loc or "module", allowed=allowed)
    error.op = op
    raise error


def _check_op(
    op: Op, module: Module, target_ops: frozenset[str] | None, defined: set[Value], dead: dict[Value, Op]
) -> None:
    if not allows(module.level, op.name, target_ops):
        _fail(op, f"is not legal at level {module.level.value}")
    for value in op.operands:
        if value not in defined:
            _fail(op, "reads a value before it is made")
        if value in dead:
            _fail(op, f"reads a state that {dead[value].name} @{dead[value].loc} has overwritten")
    try:
        inferred, found = op.infer(), tuple(v.type for v in op.results)
    except IRError as error:
        error.op = op
        raise
    if inferred != found:
        _fail(op, f"has results {[str(t) for t in found]}, its operands give {[str(t) for t in inferred]}")
    if op.definition.consumes is not None:
        dead[op.operands[op.definition.consumes]] = op


def _check_outputs(module: Module, defined: set[Value], dead: dict[Value, Op]) -> None:
    for name, value in module.outputs.items():
        if value not in defined:
            raise VerifyError(f"output {name!r} is not made by the module", where=module.name)
        if value in dead:
            raise VerifyError(f"output {name!r} has been overwritten", where=dead[value].loc)
    for name, value in module.states.items():
        after = module.outputs.get(name)
        if after is None or after.type != value.type:
            raise VerifyError(
                f"state {name!r} needs an output of its own type {value.type}", where=module.name
            )


def _check_uses(module: Module) -> None:
    """Every use in a use list is an operand and the other way round."""
    ops = set(module.ops)
    for op in module.ops:
        for index, value in enumerate(op.operands):
            if (op, index) not in value.uses:
                _fail(op, f"operand {index} lacks its use entry")
        for value in op.results:
            for user, index in value.uses:
                if user not in ops or user.operands[index] is not value:
                    _fail(op, f"has a stale use by {user!r}")
