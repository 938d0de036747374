"""Norms with the rotation that follows, and the closing of compressed entries with everything before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.rewrite import Bindings, Pat, Rule, any_, match

from .base import Pass
from .cleanup import EliminateDeadCode
from .merge_projections import rewire, unusual

_ANGLES = (any_("cos"), any_("sin"))


def _norm_op(bindings: Bindings) -> Op:
    norm = bindings["norm"].producer
    assert norm is not None
    return norm


def _plain(bindings: Bindings, op: Op) -> str:
    return unusual(op) or unusual(_norm_op(bindings), "eps")


def _norm_rotary(b: Builder, bindings: Bindings, op: Op) -> Value:
    norm = _norm_op(bindings)
    x, *weight = norm.operands
    return b.op("norm_rotary", x, bindings["cos"], bindings["sin"], *weight, eps=norm.attrs["eps"])


NORM_ROTARY = tuple(
    Rule(f"{norm}_rotary", Pat("rotary", (Pat(norm, bind="norm", single_use=True), *_ANGLES)),
         _norm_rotary, _plain)
    for norm in ("unit_norm", "rms_norm")
)  # fmt: skip


@dataclass(frozen=True)
class FuseNormRotary(Pass):
    """unit_norm or rms_norm, then rotary -> norm_rotary; exact."""

    name: ClassVar[str] = "fuse_norm_rotary"
    doc: ClassVar[str] = "rotate rows while they are normalised"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED
    rules: ClassVar[tuple[Rule, ...]] = NORM_ROTARY


_RINGS = (any_("kv_ring"), any_("gate_ring"), any_("pos"), any_("n_valid"))
_CLOSE = Pat("entries_append", (
    any_("entries"),
    Pat("norm_rotary", (
        Pat("compress", (any_("kv"), any_("gate"), *_RINGS), "pooled", single_use=True),
        *_ANGLES, any_("w"),
    ), "rows", single_use=True),
    any_("pos"), any_("n_valid"),
))  # fmt: skip


@dataclass(frozen=True)
class FuseRotaryWrite(Pass):
    """compress, norm_rotary, entries_append -> entries_close; exact.

    The rotary in front of a `ring_write` is left alone, and `module.notes["fuse_rotary_write"]` says so:
    attention reads the ring as it was before the call, so the write cannot move up to the rotation.
    """

    name: ClassVar[str] = "fuse_rotary_write"
    doc: ClassVar[str] = "pool, normalise, rotate and store compressed entries in one"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED

    def run(self, module: Module) -> int:
        fused, kept = 0, {}
        for op in [op for op in module.ops if op.name in ("entries_append", "ring_write")]:
            if op.name == "ring_write":
                if reason := ring_stays(op):
                    kept[op.loc] = reason
                continue
            found = recognise_close(module, op)
            if isinstance(found, str):
                kept[op.loc] = found
            else:
                _close(module, op, *found)
                fused += 1
        EliminateDeadCode().run(module)
        module.notes[self.name] = {"fused": fused, "kept": kept}
        return fused


def ring_stays(op: Op) -> str:
    """Why the rotation in front of a ring_write is not fused with it; "" where there is none."""
    ring, rows = op.operands[:2]
    if rows.producer is None or rows.producer.name not in ("rotary", "norm_rotary"):
        return ""
    others = [user for user in ring.users() if user is not op]
    if others:
        return f"{others[0].name} reads the ring as it was before this call, after the rotation"
    return "the rows have other readers" if len(rows.uses) > 1 else "no kernel writes rings"


def recognise_close(module: Module, append: Op) -> tuple[Bindings, list[Op]] | str:
    """What an `entries_close` takes and the ring writes that must move behind it, or why it cannot be."""
    outcome = match(_CLOSE, append.result)
    if outcome.bindings is None:
        return outcome.reason
    found = outcome.bindings
    pooled, rows = found["pooled"].producer, found["rows"].producer
    assert pooled is not None and rows is not None
    if pooled.attrs["ratio"] != append.attrs["ratio"]:
        wanted, made = append.attrs["ratio"], pooled.attrs["ratio"]
        return f"it appends groups of {wanted}, the pooled ones are {made} long"
    if reason := unusual(pooled, "ratio", "overlap") or unusual(rows, "eps") or unusual(append, "ratio"):
        return reason
    start, end = module.ops.index(pooled), module.ops.index(append)
    late = []
    for op in module.ops[start:end]:
        index = op.definition.consumes
        if index is None or op.operands[index] not in (found["kv_ring"], found["gate_ring"]):
            continue
        if op.result.uses:
            return f"{op.name} @{op.loc} writes a ring that is read again before the entries are"
        late.append(op)
    return found, late


def _close(module: Module, append: Op, found: Bindings, late: list[Op]) -> None:
    pooled, rows = found["pooled"].producer, found["rows"].producer
    assert pooled is not None and rows is not None
    builder = Builder(Module(module.name))
    builder.loc = append.loc
    names = ("entries", "kv", "gate", "kv_ring", "gate_ring", "w", "cos", "sin", "pos", "n_valid")
    closed = builder.op(
        "entries_close", *(found[n] for n in names), eps=rows.attrs["eps"],
        ratio=pooled.attrs["ratio"], overlap=pooled.attrs["overlap"],
    )  # fmt: skip
    rewire(module, append.result, closed)
    append.drop()
    kept = [op for op in module.ops if op not in late]
    at = kept.index(append)
    module.ops = [*kept[:at], *builder.module.ops, *late, *kept[at + 1 :]]
