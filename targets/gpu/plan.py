"""From a TARGET module to a launch plan without code: programs, buffers, what passes between devices, and
which kernels must be built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsv4c.errors import TargetError, unknown
from dsv4c.ir.cost import bytes_of, stored_bytes
from dsv4c.ir.dims import Dim
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.weights import WeightExpr
from dsv4c.runtime.container.launches import Buffer, Kernel
from dsv4c.runtime.container.plan import VERSION, Handover, Plan, Program
from dsv4c.runtime.container.plan import Stage as PlanStage
from dsv4c.targets.stages import Stage, split

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


@dataclass(frozen=True)
class _Piece:
    """What one device computes: a whole module, a part, or a stage.

    Attributes:
        stage: the number of the device.
        ops: in order.
        handed: values that earlier stages leave, by the names of their buffers.
        outputs: what its programs leave, without states.
        named: whether its programs have the number in front of their names.
    """

    stage: int
    ops: Sequence[Op]
    handed: Mapping[str, Value]
    outputs: Mapping[str, Value]
    named: bool = False


def draft(module: Module, gpu: Gpu) -> Draft:
    """The launch plan of a module: for every stage one program for few rows and one for any number, and one
    for every part.

    Stages are as `passes.spread_layers` wants them; without it there is one.

    Raises:
        TargetError: an op, or a form of it, has no kernel; a part has states; or there are fewer layers than
            devices.
    """
    kernels, weights, near = Kernels(), dict[str, Stored](), dict[str, Near]()
    stages = stages_of(module)
    made = [
        _program(module, piece, gpu, kernels, weights, near, few)
        for piece in _pieces(module, stages)
        for few in (True, False)
    ]
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
        piece = _Piece(0, part.ops, {}, part.outputs)
        made.append(_program(part, piece, gpu, kernels, weights, near, False, name))
        inputs = (_buffer(_name(name, n), "input", v, _bound(part)) for n, v in part.inputs.items())
        buffers += [replace(b, part=name) for b in inputs]
    buffers += [
        *(_weight(name, expr) for name, expr in weights.items()),
        Buffer(UNUSED, "weight", "f32", ("1",)),
    ]  # fmt: skip
    plan = Plan(
        VERSION, gpu.vendor, gpu.name, gpu.capability, gpu.exact, 0, gpu.shared, tuple(buffers),
        tuple(kernels.all), tuple(program for program, _ in made),
        tuple(PlanStage(stage.first, stage.last) for stage in stages), tuple(_handovers(stages, bound)),
    )  # fmt: skip
    return Draft(plan, weights, tuple(tuple(callers) for _, callers in made), tuple(near.values()))


def stages_of(module: Module) -> list[Stage]:
    """The stages of a module, each with copies of the states that it reads; see `passes.spread_layers`."""
    spread = module.meta.get("spread")
    if not isinstance(spread, dict) or spread["devices"] == 1:
        return [Stage(0, -1, {}, module.outputs, tuple(module.ops))]
    sizes = {"B": spread["batch"], "ctx": spread["context"]}
    weights = {op: stored_bytes(op) for op in module.weights()}
    besides = {name: bytes_of(value, sizes) for name, value in module.states.items()}
    for name, part in module.parts.items():
        besides[name] = sum(stored_bytes(op) for op in part.weights())
    return split(module, spread["devices"], weights, besides=besides, replicas=True)


def _pieces(module: Module, stages: Sequence[Stage]) -> Iterator[_Piece]:
    for number, stage in enumerate(stages):
        outputs = {name: v for name, v in stage.outputs.items() if name not in module.states}
        yield _Piece(number, stage.ops, stage.inputs, outputs, len(stages) > 1)


def _handovers(stages: Sequence[Stage], bound: frozenset[str]) -> Iterator[Handover]:
    """A copy for every value and every stage that reads it, from the stage that makes it."""
    for target, stage in enumerate(stages):
        for name, value in stage.inputs.items():
            source = next(n for n, earlier in enumerate(stages) if earlier.outputs.get(name) is value)
            yield Handover(source, target, _buffer(name, "handed", value, bound))


def _name(part: str, name: str) -> str:
    """How a buffer of a part is called in the plan."""
    return f"{part}.{name}" if part else name


def _program(
    module: Module, piece: _Piece, gpu: Gpu, kernels: Kernels, weights: dict[str, Stored],
    near: dict[str, Near], few: bool,
    part: str = "",
) -> tuple[Program, list[Op]]:  # fmt: skip
    exact = not any(op.attrs.get("inputs") == "bf16" for op in module.ops)
    c = Context(gpu, few, exact, _bound(module), kernels, weights, near=near)
    for name, value in module.arguments().items():
        c.values[value] = Ref(_name(part, name), 0, _stride(value))
    c.values |= {value: Ref(name, 0, _stride(value)) for name, value in piece.handed.items()}
    for op in piece.ops:
        if op.name not in LOWERINGS:
            raise TargetError(str(unknown("op", op.name, LOWERINGS, TargetError)), where=op.loc)
        c.op = op
        LOWERINGS[op.name](c, op)
    outputs = {name: c.values[v] for name, v in piece.outputs.items()}
    for name, ref in outputs.items():
        if ref.offset or ref.stride not in (0, _stride(piece.outputs[name])):
            raise TargetError(f"output {name} is a part of wider rows", where=module.name)
    kept = {name: ref.buffer for name, ref in outputs.items()}
    typical = _typical(module, few)
    placed, slots = place(c.temporaries.values(), c.launches, kept.values(), typical)
    rows, most = ("B*T", FEW_ROWS) if few else ("1", 0)
    if few and not {"B", "T"} <= _bound(module):
        rows = "1"
    name = part or ("few" if few else "many")
    name = f"{piece.stage}.{name}" if piece.named else name
    return Program(name, rows, most, placed, slots, tuple(c.launches), kept, part, piece.stage), c.callers


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
    return replace(plan, kernels=kernels, driver=driver)
