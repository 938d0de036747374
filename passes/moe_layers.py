"""Finds the mixture-of-experts layers of a MODEL graph and rewrites one to fewer experts.

Owns what a layer's router, dispatch, experts and combine look like. Knows no reason to keep an expert or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from dsv4c.errors import PassError
from dsv4c.ir import weights as w
from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.rewrite import Pat, match
from dsv4c.ir.tables import NONE
from dsv4c.ir.weights import TensorStore, WeightExpr


@dataclass(frozen=True, eq=False)
class MoeLayer:
    """One layer of routed experts, each a sub-graph of its own between `dispatch` and `combine`.

    Attributes:
        loc: of the dispatch, e.g. ``layers.3.ffn``.
        logits: the `linear` of the router; its weight has a row per expert.
        scores: the op between it and the choice.
        route: `route_topk` over a bias, perhaps with a second one for image tokens, or `route_hash` over a
            table.
        experts: per expert its ops in execution order, weights left out.
    """

    loc: str
    logits: Op
    scores: Op
    route: Op
    dispatch: Op
    combine: Op
    experts: tuple[tuple[Op, ...], ...]

    @property
    def count(self) -> int:
        return len(self.experts)

    @property
    def hashed(self) -> bool:
        return self.route.name == "route_hash"

    @property
    def chosen(self) -> int:
        """Experts per token."""
        last = self.route.result.type.shape[-1]
        assert isinstance(last, int)
        return last

    @property
    def gate(self) -> WeightExpr:
        """[E,d], the router's rows."""
        return _weight(self.logits, 1)

    @property
    def table(self) -> WeightExpr:
        """[V,k], the experts of every token; of a hash layer."""
        assert self.hashed, "a layer that chooses by score has biases"
        return _weight(self.route, 1)

    @property
    def biases(self) -> tuple[WeightExpr, ...]:
        """[E] each: that of text, and where the model takes images theirs; none in a hash layer."""
        return () if self.hashed else tuple(_weight(self.route, i) for i in _biases(self.route))

    @property
    def nbytes(self) -> int:
        """Bytes of router and routed experts as the checkpoint stores them."""
        weights = {v.producer for ops in self.experts for op in ops for v in op.operands if _is_weight(v)}
        exprs = [op.weight for op in weights if op and op.weight]
        selectors = (self.table,) if self.hashed else self.biases
        return sum(stored_bytes(x) for x in (self.gate, *selectors, *exprs))


def _biases(route: Op) -> tuple[int, ...]:
    """The operands of `route_topk` that are biases."""
    return (1, 3) if len(route.operands) > 2 else (1,)


def _weight(op: Op, index: int) -> WeightExpr:
    producer = op.operands[index].producer
    assert producer is not None and producer.weight is not None
    return producer.weight


def _is_weight(value: Value) -> bool:
    return value.producer is not None and value.producer.weight is not None


def stored_bytes(x: WeightExpr) -> int:
    """Bytes of the checkpoint that an expression needs; of a part of a tensor, its share."""
    if x.op == "source":
        return x.nbytes
    below = sum(stored_bytes(a) for a in x.args)
    return below * prod(x.shape) // prod(x.args[0].shape) if x.op in ("take", "rows") else below


# ---------------------------------------------------------------------------------- recognising

_ROUTER = Pat("sqrt_softplus", (Pat("linear", (Pat(), Pat("weight")), bind="logits"),), bind="scores")


def find_layers(module: Module) -> tuple[list[MoeLayer], dict[str, str]]:
    """The layers that can be rewritten, in order, and the location of every other dispatch with why not."""
    layers, refused = [], {}
    order = {op: i for i, op in enumerate(module.ops)}
    for op in module.ops:
        if op.name == "dispatch":
            found = _recognise(module, op, order)
            if isinstance(found, str):
                refused[op.loc] = found
            else:
                layers.append(found)
    return layers, refused


def _recognise(module: Module, dispatch: Op, order: dict[Op, int]) -> MoeLayer | str:
    ids, weights = dispatch.operands[1].producer, dispatch.operands[2].producer
    if ids is None or ids.name not in ("route_topk", "route_hash"):
        return "its ids come from no router"
    if not all(_is_weight(ids.operands[i]) for i in (_biases(ids) if ids.name == "route_topk" else (1,))):
        return "its ids come from no router with a stored bias or table"
    if weights is None or weights.name != "route_weights" or weights.operands[1] is not ids.result:
        return "its routing weights are not those of its ids"
    router = match(_ROUTER, weights.operands[0])
    if router.bindings is None:
        return f"its scores are not those of a linear router: {router.reason}"
    scores, logits = (router.bindings[name].producer for name in ("scores", "logits"))
    assert scores and logits
    if ids.name == "route_topk" and ids.operands[0] is not scores.result:
        return "its ids and its routing weights come from different scores"
    if set(scores.result.users()) - {ids, weights} or logits.result.users() != [scores]:
        return "something else reads its scores"
    if module.output_values() & {logits.result, scores.result, ids.result, weights.result}:
        return "its routing is an output"
    bodies = _experts(module, dispatch, order)
    if isinstance(bodies, str):
        return bodies
    combine, experts = bodies
    if set(ids.result.users()) - {weights, dispatch, combine} or weights.result.users() != [dispatch]:
        return "something else reads its ids or routing weights"
    return MoeLayer(dispatch.loc, logits, scores, ids, dispatch, combine, experts)


def _experts(
    module: Module, dispatch: Op, order: dict[Op, int]
) -> tuple[Op, tuple[tuple[Op, ...], ...]] | str:
    """The combine and the ops between it and each expert's rows."""
    count = len(dispatch.results) // 2
    combine: Op | None = None
    bodies: list[tuple[Op, ...]] = []
    for expert in range(count):
        body, ends = _forward(dispatch.results[2 * expert : 2 * expert + 2])
        if len({op for op, _ in ends} | ({combine} if combine else set())) != 1:
            return f"the rows of expert {expert} do not end in one combine"
        combine = ends[0][0]
        if [index for _, index in ends] != [2 + expert]:
            return f"the rows of expert {expert} reach another place of the combine"
        if any(set(body) & set(other) for other in bodies):
            return f"expert {expert} shares an op with another"
        if module.output_values().intersection(v for op in body for v in op.results):
            return f"expert {expert} makes an output"
        bodies.append(tuple(sorted(body, key=order.__getitem__)))
    if combine is None or len(combine.operands) != 2 + count:
        return "the combine does not take every expert of its dispatch"
    if combine.operands[0] is not dispatch.operands[1] or combine.operands[1] is not dispatch.operands[3]:
        return "the combine scatters by other ids or padding than the dispatch gathered by"
    return combine, tuple(bodies)


def _forward(values: Sequence[Value]) -> tuple[list[Op], list[tuple[Op, int]]]:
    """Every op that depends on `values` up to a combine, and the operands of combines they end in."""
    body: dict[Op, None] = {}
    ends: dict[tuple[Op, int], None] = {}
    waiting = list(values)
    while waiting:
        for op, index in waiting.pop().uses:
            if op.name == "combine":
                ends[op, index] = None
            elif op not in body:
                body[op] = None
                waiting += op.results
    return list(body), list(ends)


# ------------------------------------------------------------------------------------ rewriting


def keep_experts(module: Module, layer: MoeLayer, kept: Sequence[int], store: TensorStore | None) -> None:
    """Rewrite `layer` in place to the experts `kept` (ascending), numbered anew in that order.

    Router rows and the entries of every bias go with their experts. In a hash layer the tokens of an expert
    that goes are sent to the nearest one kept, see `substitutes`. Locations are renumbered, so that a
    weight's location stays its published name in the smaller model. What loses its last reader is left for
    dead code elimination.

    Raises:
        PassError: fewer experts than a token chooses, or a hash layer without the bytes of its router.
    """
    if len(kept) < layer.chosen:
        raise PassError(
            f"{len(kept)} experts would remain",
            where=layer.loc,
            allowed=f"at least {layer.chosen}, which every token chooses",
        )
    if layer.hashed:  # by the router's old rows
        choice = {1: w.reroute(layer.table, layer.count, substitutes(layer, kept, store))}
    else:
        choice = {i: keep_rows(_weight(layer.route, i), kept) for i in _biases(layer.route)}
    made: dict[Op, list[Op]] = {}
    _replace_weights(made, layer.logits, {1: keep_rows(layer.gate, kept)})
    _retype(layer.scores)
    _replace_weights(made, layer.route, choice)
    label = layer.dispatch.attrs["label"]
    builder = _builder(module, layer.dispatch)
    dispatch = builder.multi("dispatch", *layer.dispatch.operands, experts=len(kept), label=label)
    made[layer.dispatch] = [dispatch, layer.dispatch]
    for new, old in enumerate(kept):
        for which in (0, 1):
            layer.dispatch.results[2 * old + which].replace_with(dispatch.results[2 * new + which])
        _renumber(layer, old, new)
    ys = [layer.combine.operands[2 + e] for e in kept]
    builder = _builder(module, layer.combine)
    combine = builder.op("combine", *layer.combine.operands[:2], *ys)
    layer.combine.result.replace_with(combine)
    for name, value in module.outputs.items():
        if value is layer.combine.result:
            module.outputs[name] = combine
    layer.combine.drop()
    made[layer.combine] = builder.module.ops
    module.ops = [one for op in module.ops for one in made.get(op, [op])]


def keep_rows(x: WeightExpr, kept: Sequence[int]) -> WeightExpr:
    """The rows `kept` (ascending) of the leading axis, as joined runs."""
    runs: list[list[int]] = []
    for row in kept:
        if runs and runs[-1][1] == row:
            runs[-1][1] = row + 1
        else:
            runs.append([row, row + 1])
    parts = tuple(w.rows(x, start, stop) for start, stop in runs)
    return parts[0] if len(parts) == 1 else w.concat(parts)


def substitutes(layer: MoeLayer, kept: Sequence[int], store: TensorStore | None) -> tuple[int, ...]:
    """For `reroute`: per old expert its new number, or for one that goes the nearest ones kept, in order.

    Near means a small cosine distance between the rows of the router; ties go to the lower id. As many are
    named as a token has experts, so that a row always finds one it does not hold yet.
    """
    if store is None:
        raise PassError(
            "the nearest experts of a hash layer depend on its router, and the module has no weights",
            where=layer.loc,
            hint="load it from a checkpoint",
        )
    rows = w.values(layer.gate, store).astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    number = {old: new for new, old in enumerate(kept)}
    out: list[int] = []
    for old in range(layer.count):
        if old in number:
            out += [number[old]] + [NONE] * (layer.chosen - 1)
        else:
            nearest = np.argsort(-(rows[list(kept)] @ rows[old]), kind="stable")
            out += nearest[: layer.chosen].tolist()
    return tuple(out)


def _builder(module: Module, like: Op) -> Builder:
    builder = Builder(Module(module.name))
    builder.loc = like.loc
    return builder


def _replace_weights(made: dict[Op, list[Op]], reader: Op, exprs: Mapping[int, WeightExpr]) -> None:
    """Give operands of `reader` other weights, which stand right before it, and infer its results anew."""
    builder = Builder(Module(""))
    for index, expr in exprs.items():
        old = reader.operands[index].producer
        assert old is not None
        reader.set_operand(index, builder.weight(expr, old.loc))
    made[reader] = [*builder.module.ops, reader]
    _retype(reader)


def _retype(op: Op) -> None:
    for value, type_ in zip(op.results, op.infer(), strict=True):
        value.type = type_


def _renumber(layer: MoeLayer, old: int, new: int) -> None:
    """The rows of an expert are named after its number, in types and in locations."""
    before, after = f"{layer.loc}.experts.{old}", f"{layer.loc}.experts.{new}"
    for op in layer.experts[old]:
        _retype(op)
        for one in (op, *(v.producer for v in op.operands if _is_weight(v))):
            if one is not None and (one.loc == before or one.loc.startswith(before + ".")):
                one.loc = after + one.loc.removeprefix(before)
