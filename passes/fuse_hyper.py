"""The border between two sub-layers in one op: expand the streams, mix, collapse, normalise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.levels import Level

from .base import Pass
from .cleanup import EliminateDeadCode
from .merge_projections import rewire, unusual


@dataclass(frozen=True)
class FuseHyper(Pass):
    """hc_mix, hc_collapse, rms_norm -> hc_pre, and with the hc_expand before them hc_post_pre; exact.

    The streams may be collapsed by other weights than those of the mix, as in V4.1, where they come from the
    mix before.

    Attributes:
        expand: whether to take in the expansion of the sub-layer before.
    """

    name: ClassVar[str] = "fuse_hyper"
    doc: ClassVar[str] = "cross from one sub-layer to the next in one op"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED
    expand: bool = True

    def run(self, module: Module) -> int:
        order = {op: i for i, op in enumerate(module.ops)}
        replacements: dict[Op, list[Op]] = {}
        taken: set[Op] = set()
        kept: dict[str, str] = {}
        for norm in [op for op in module.ops if op.name == "rms_norm"]:
            found = recognise(norm, order)
            if isinstance(found, str):
                if _of_streams(norm):
                    kept[norm.loc] = found
                continue
            if found in taken:
                kept[norm.loc] = "its mix is part of another border"
                continue
            taken.add(found)
            before = _expansion(found, norm, order) if self.expand else "the option says so"
            if isinstance(before, str):
                kept[found.loc] = f"the streams stay: {before}"
            made = _replace(module, norm, found, before if isinstance(before, Op) else None)
            replacements[norm] = made
            order |= {op: order[norm] for op in made}
        module.ops = [one for op in module.ops for one in (*replacements.get(op, ()), op)]
        EliminateDeadCode().run(module)
        module.notes[self.name] = {"fused": len(replacements), "kept": kept}
        return len(replacements)


def _of_streams(norm: Op) -> bool:
    producer = norm.operands[0].producer
    return producer is not None and producer.name == "hc_collapse"


def recognise(norm: Op, order: dict[Op, int]) -> Op | str:
    """The hc_mix of the streams whose collapse `norm` normalises, or why the three cannot be one."""
    if not _of_streams(norm):
        return "it normalises no collapsed streams"
    collapse = norm.operands[0].producer
    assert collapse is not None
    if len(collapse.result.uses) > 1:
        return f"the collapsed streams have {len(collapse.result.uses)} readers"
    streams, pre = collapse.operands
    mix = pre.producer
    if mix is None or mix.name != "hc_mix" or mix.operands[0] is not streams:
        mixes = [op for op in streams.users() if op.name == "hc_mix" and order[op] < order[norm]]
        if len(mixes) != 1:
            return f"the streams are collapsed by weights from outside and mixed {len(mixes)} times"
        mix = mixes[0]
    elif pre is not mix.results[0]:
        return "the streams are collapsed by other weights than the mix gives"
    elif len(pre.uses) > 1:
        return "the collapse weights have other readers"
    if reason := unusual(mix, "eps", "norm_eps", "iters") or unusual(norm, "eps"):
        return reason
    return _too_early(mix.results if pre is not mix.results[0] else mix.results[1:], norm, order) or mix


def _too_early(values: list[Value], norm: Op, order: dict[Op, int]) -> str:
    """Why the fused op, which stands where the norm stood, would come too late for a reader; or ""."""
    early = [u for v in values for u in v.users() if order[u] < order[norm]]
    return f"{early[0].name} @{early[0].loc} reads a result before the norm" if early else ""


def _expansion(mix: Op, norm: Op, order: dict[Op, int]) -> Op | str:
    """The hc_expand that makes the streams of `mix`, or why it must stay."""
    expand = mix.operands[0].producer
    if expand is None or expand.name != "hc_expand":
        return f"they come from {expand.name if expand else 'an argument'}"
    inner = {mix, norm.operands[0].producer}
    early = [u for u in expand.result.users() if u not in inner and order[u] < order[norm]]
    return f"{early[0].name} @{early[0].loc} reads them before the norm" if early else expand


def _replace(module: Module, norm: Op, mix: Op, expand: Op | None) -> list[Op]:
    builder = Builder(Module(module.name))
    builder.loc = mix.loc
    attrs = {**mix.attrs, "out_eps": norm.attrs["eps"]}
    pre = norm.operands[0].producer.operands[1]  # type: ignore[union-attr]
    other = pre is not mix.results[0]
    parameters = (*mix.operands[1:], norm.operands[1], *([pre] if other else []))
    if expand is None:
        results = builder.multi("hc_pre", mix.operands[0], *parameters, **attrs).results
    else:
        streams, *results = builder.multi("hc_post_pre", *expand.operands, *parameters, **attrs).results
        rewire(module, expand.result, streams)
    replaced = [norm.result, *mix.results[1:], *([mix.results[0]] if other else [])]
    for old, new in zip(replaced, results, strict=True):
        rewire(module, old, new)
    return builder.module.ops
