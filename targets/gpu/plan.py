"""From a TARGET module to a launch plan without code: programs, buffers, and which kernels must be built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsv4c.errors import TargetError, unknown
from dsv4c.ir.dims import Dim
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.weights import WeightExpr
from dsv4c.runtime.container.plan import VERSION, Buffer, Kernel, Plan, Program

from .arch import Gpu
from .context import NUMBERS, UNUSED, Context, Kernels, Ref, Stored, size_text
from .lowering import LOWERINGS
from .near import Near
from .slots import place
from .tiles import FEW_ROWS


@dataclass(frozen=True)
class Draft:
    """A plan whose kernels have no code yet.

    Attributes:
        weights: the expressions of its weights by buffer.
        callers: per program, the op of each launch.
        near: what is to be looked at before weights are written.
    """

    plan: Plan
    weights: Mapping[str, Stored]
    callers: tuple[tuple[Op, ...], ...]
    near: tuple[Near, ...] = ()


def draft(module: Module, gpu: Gpu) -> Draft:
    """The launch plan of a module: one program for few rows, one for any number, and one for every part.

    Raises:
        TargetError: an op, or a form of it, has no kernel; or a part has states.
    """
    kernels, weights, near = Kernels(), dict[str, Stored](), dict[str, Near]()
    made = [_program(module, gpu, kernels, weights, near, few) for few in (True, False)]
    bound = _bound(module)
    buffers = [
        *(_buffer(name, "input", v, bound) for name, v in module.inputs.items()),
        *(_buffer(name, "state", v, bound) for name, v in module.states.items()),
    ]  # fmt: skip
    for name, part in module.parts.items():
        if part.states:
            raise TargetError(
                f"part {name} has states", where=module.name, allowed="parts without, such as vision",
                hint="leave out the pass that makes it" + ": allow_replay" * (name == "encoder"),
            )  # fmt: skip
        made.append(_program(part, gpu, kernels, weights, near, False, name))
        inputs = (_buffer(_name(name, n), "input", v, _bound(part)) for n, v in part.inputs.items())
        buffers += [replace(b, part=name) for b in inputs]
    buffers += [
        *(_weight(name, expr) for name, expr in weights.items()),
        Buffer(UNUSED, "weight", "f32", ("1",)),
    ]  # fmt: skip
    plan = Plan(
        VERSION, gpu.vendor, gpu.name, gpu.capability, gpu.exact, 0, gpu.shared, tuple(buffers),
        tuple(kernels.all), tuple(program for program, _ in made),
    )  # fmt: skip
    return Draft(plan, weights, tuple(tuple(callers) for _, callers in made), tuple(near.values()))


def _name(part: str, name: str) -> str:
    """How a buffer of a part is called in the plan."""
    return f"{part}.{name}" if part else name


def _program(
    module: Module, gpu: Gpu, kernels: Kernels, weights: dict[str, Stored], near: dict[str, Near], few: bool,
    part: str = "",
) -> tuple[Program, list[Op]]:  # fmt: skip
    exact = not any(op.attrs.get("inputs") == "bf16" for op in module.ops)
    c = Context(gpu, few, exact, _bound(module), kernels, weights, near=near)
    for name, value in module.arguments().items():
        c.values[value] = Ref(_name(part, name), 0, _stride(value))
    for op in module.ops:
        if op.name not in LOWERINGS:
            raise TargetError(str(unknown("op", op.name, LOWERINGS, TargetError)), where=op.loc)
        c.op = op
        LOWERINGS[op.name](c, op)
    outputs = {name: c.values[v] for name, v in module.outputs.items() if name not in module.states}
    for name, ref in outputs.items():
        if ref.offset or ref.stride not in (0, _stride(module.outputs[name])):
            raise TargetError(f"output {name} is a part of wider rows", where=module.name)
    kept = {name: ref.buffer for name, ref in outputs.items()}
    typical = _typical(module, few)
    placed, slots = place(c.temporaries.values(), c.launches, kept.values(), typical)
    rows, most = ("B*T", FEW_ROWS) if few else ("1", 0)
    if few and not {"B", "T"} <= _bound(module):
        rows = "1"
    name = part or ("few" if few else "many")
    return Program(name, rows, most, placed, slots, tuple(c.launches), kept, part), c.callers


def _stride(value: Value) -> int:
    """Elements between rows [B,T]."""
    out = 1
    for d in value.type.shape[2:]:
        out *= d if isinstance(d, int) else 1
    return out


def _bound(module: Module) -> frozenset[str]:
    """Symbols that stand alone in some argument's shape."""
    shapes = [v.type.shape for v in module.arguments().values()]
    return frozenset(d.name for shape in shapes for d in shape if isinstance(d, Dim) and d.op == "sym")


def _buffer(name: str, kind: str, value: Value, bound: frozenset[str]) -> Buffer:
    if value.type.dtype not in NUMBERS:
        raise TargetError(f"{kind} {name} is {value.type.dtype.value}", allowed=", ".join(NUMBERS.values()))
    return Buffer(name, kind, NUMBERS[value.type.dtype], tuple(size_text(d, bound) for d in value.type.shape))


def _weight(name: str, expr: Stored) -> Buffer:
    dtype = expr.dtype.value if isinstance(expr, WeightExpr) else f"i{8 * expr.itemsize}"
    return Buffer(name, "weight", dtype, tuple(str(n) for n in expr.shape) or ("1",))


def _typical(module: Module, few: bool) -> dict[str, int]:
    """Sizes at which slots are chosen; any choice is right, this one decides which is small."""
    bound = _bound(module)
    names = {
        size_text(d, bound) for v in module.arguments().values() for d in v.type.shape if isinstance(d, Dim)
    }
    return dict.fromkeys(names, 1024) | {"B": 1, "T": 1 if few else 256, "L": 1}


def built(plan: Plan, kernels: tuple[Kernel, ...], driver: int) -> Plan:
    """The plan with the kernels that a build made of its own, and the driver that they need."""
    return Plan(
        plan.version, plan.vendor, plan.arch, plan.capability, plan.exact, driver, plan.shared_limit,
        plan.buffers, kernels, plan.programs,
    )  # fmt: skip
