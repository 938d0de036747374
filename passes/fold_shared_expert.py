"""The shared expert as one more routed expert that every token chooses with weight 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.ir import weights as w
from dsv4c.ir.graph import Builder, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.rewrite import Bindings, Pat, Rule, any_
from dsv4c.ir.weights import WeightExpr

from .base import Pass
from .stored_format import stored_format

_SHARED = Pat("linear", (
    Pat("clamped_swiglu", (
        Pat("linear", (any_("x"), Pat("weight", bind="s1", single_use=True)), single_use=True),
        Pat("linear", (any_("x"), Pat("weight", bind="s3", single_use=True)), single_use=True),
    ), "act", single_use=True),
    Pat("weight", bind="s2", single_use=True),
), single_use=True)  # fmt: skip
_ROUTED = Pat("expert_mlp", (
    any_("x"), any_("ids"), any_("weights"), any_("n_valid"),
    Pat("weight", bind="w13", single_use=True), Pat("weight", bind="w2", single_use=True),
), "routed", single_use=True)  # fmt: skip


def _expr(value: Value) -> WeightExpr:
    assert value.producer is not None and value.producer.weight is not None
    return value.producer.weight


def _entries(stack: WeightExpr) -> tuple[WeightExpr, ...]:
    return stack.args if stack.op == "stack" else tuple(w.take(stack, i) for i in range(stack.shape[0]))


def _fits(bindings: Bindings, op: Op) -> str:
    routed, act = bindings["routed"].producer, bindings["act"].producer
    assert routed is not None and act is not None
    for attr in routed.definition.attrs:
        if attr.name != "limit" and routed.attrs[attr.name] != attr.default:
            return f"the routed experts have {attr.name} = {routed.attrs[attr.name]!r}"
    if act.attrs["limit"] != routed.attrs["limit"]:
        return f"the limits differ: {act.attrs['limit']} and {routed.attrs['limit']}"
    s1, s3, s2, w13, w2 = (_expr(bindings[n]) for n in ("s1", "s3", "s2", "w13", "w2"))
    if s1.shape != s3.shape or s2.shape != w2.shape[1:] or (2 * s1.shape[0], s1.shape[1]) != w13.shape[1:]:
        return f"the shapes differ: {s1.shape}, {s3.shape}, {s2.shape} and {w13.shape[1:]}, {w2.shape[1:]}"
    formats = {stored_format(e) for e in (s1, s3, s2, w13, w2)}
    return f"they are stored in different formats: {'; '.join(sorted(formats))}" if len(formats) > 1 else ""


def _fold(b: Builder, bindings: Bindings, op: Op) -> Value:
    routed = bindings["routed"].producer
    assert routed is not None
    s1, s3, s2, w13, w2 = (_expr(bindings[n]) for n in ("s1", "s3", "s2", "w13", "w2"))
    ids, weights = b.multi(
        "add_route", bindings["ids"], bindings["weights"], expert=w13.shape[0]
    ).results
    names = [bindings[n].producer.loc for n in ("w13", "w2")]  # type: ignore[union-attr]
    first = b.weight(w.stack((*_entries(w13), w.concat((s1, s3)))), names[0])
    second = b.weight(w.stack((*_entries(w2), s2)), names[1])
    return b.op("expert_mlp", bindings["x"], ids, weights, bindings["n_valid"], first, second, **routed.attrs)


SHARED_EXPERT = (
    Rule("shared_last", Pat("add", (_ROUTED, _SHARED)), _fold, _fits),
    Rule("shared_first", Pat("add", (_SHARED, _ROUTED)), _fold, _fits),
)


@dataclass(frozen=True)
class FoldSharedExpert(Pass):
    """add(expert_mlp(x), shared MLP of x) -> expert_mlp with one expert more; exact.

    A token's experts are summed in ascending order and the shared one comes last, so even the order of the
    sum stays. Rows of padding, which nothing may read, get 0 instead of the shared expert's output.
    """

    name: ClassVar[str] = "fold_shared_expert"
    doc: ClassVar[str] = "make the shared expert a routed one that every token chooses"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED
    rules: ClassVar[tuple[Rule, ...]] = SHARED_EXPERT
