"""Products of BFLOAT16 numbers in fixed shapes, for dialects that have a node for them (role "bf16_matmul").

Every product rounds its result to BFLOAT16, which the graph asks for where this is used. Weights are E4M3 or
E2M1 codes times powers of two, so that they are BFLOAT16 numbers exactly.
"""

from __future__ import annotations

from math import prod

from onnx import TensorProto

from dsv4c.errors import TargetError
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Op

from . import static_codes
from .core import limited_swiglu
from .lowering import V, number, size
from .moe import shares
from .static import StaticContext

BF16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


def is_exact(g: StaticContext, op: Op, index: int) -> bool:
    """Whether a weight operand is held as codes times powers of two."""
    scheme = g.scheme(op, index)
    return scheme is not None and scheme.scale is DType.F8E8M0


def is_bf16(g: StaticContext, x: V) -> bool:
    """Whether FLOAT numbers came from BFLOAT16."""
    half = g.halves.get(x)
    return half is not None and g.element_of(half) == BF16


def product(g: StaticContext, x: V, w: V) -> V:
    """FLOAT numbers that are BFLOAT16 ones, x [...,M,K] and w [...,N,K] -> x w^T [...,M,N], rounded so."""
    *lead, m, _ = g.shape_of(x)
    types = [(BF16, (*lead, m, g.shape_of(w)[-2]))]
    narrow = [g.op("Cast", value, to=BF16) for value in (x, w)]
    return g.op("Cast", g.vendor("bf16_matmul", narrow, types, transB=1)[0], to=FLOAT)


def linear(g: StaticContext, op: Op) -> V:
    """x [...,K], codes of w [N,K] -> [...,N]."""
    *lead, width = g.shape_of(g.tensor(op, 0))
    rows = g.op("Reshape", g.tensor(op, 0), [prod(lead), width])
    return g.op("Reshape", product(g, rows, g.tensor(op, 1)), [*lead, size(op, 1, 0)])


def grouped(g: StaticContext, op: Op, groups: int) -> V:
    """x [B,T,H,D] seen as [B,T,G,K], codes of w [G*r,K] -> [B,T,G*r]."""
    x, n, k = g.tensor(op, 0), size(op, 1, 0), size(op, 1, 1)
    b, t = g.shape_of(x)[:2]
    by_group = g.op("Transpose", g.op("Reshape", x, [b * t, groups, k]), perm=[1, 0, 2])
    y = product(g, by_group, g.op("Reshape", g.tensor(op, 1), [groups, n // groups, k]))
    return g.op("Reshape", g.op("Transpose", y, perm=[1, 0, 2]), [b, t, n])


# ------------------------------------------------------------------------------------------ experts


def check(g: StaticContext, op: Op) -> None:
    """Raises `TargetError` where rounding = "bf16" stands over other numbers."""
    if not (is_exact(g, op, 4) and is_exact(g, op, 5) and is_bf16(g, g.tensor(op, 0))):
        raise TargetError(
            'expert_mlp with rounding = "bf16" over other numbers', where=op.loc,
            allowed="weights in FP8 or FP4 with powers of two, rows rounded to BF16",
            hint='requantise, quantise_activations{rule="bf16_fp8"}, narrow_weights{storage="fp8"}',
        )  # fmt: skip


def few(g: StaticContext, op: Op) -> V:
    """[N,d]: per route a product with the gathered matrices of its expert."""
    tokens, width, chosen = size(op, 0, 0) * size(op, 0, 1), size(op, 0, 2), size(op, 1, 2)
    routes = tokens * chosen
    flat = g.op("Reshape", g.tensor(op, 1), [routes])
    rows = g.op("Expand", g.op("Reshape", g.tensor(op, 0), [tokens, 1, width]), [tokens, chosen, width])
    both = product(g, g.op("Reshape", rows, [routes, 1, width]), _gathered(g, op, 4, flat))
    share = g.op("Reshape", g.tensor(op, 2), [routes, 1, 1])
    y = product(g, _hidden(g, op, both, share), _gathered(g, op, 5, flat))
    return g.op("ReduceSum", g.op("Reshape", y, [tokens, chosen, width]), [1], keepdims=0)


def many(g: StaticContext, op: Op) -> V:
    """[N,d]: all tokens through all experts, as many at a time as temporaries may hold."""
    experts, inner, width = size(op, 4, 0), size(op, 5, 2), size(op, 0, 2)
    tokens, every = size(op, 0, 0) * size(op, 0, 1), shares(g, op)
    rows = g.op("Reshape", g.tensor(op, 0), [tokens, width])
    step = max(1, min(experts, g.dialect.held // (2 * inner * width + tokens * (2 * inner + width))))
    sums: list[V] = []
    for first in range(0, experts, step):
        last = min(first + step, experts)
        count = last - first
        w13 = g.op("Reshape", _some(g, op, 4, first, last), [count * 2 * inner, width])
        both = g.op("Reshape", product(g, rows, w13), [tokens, count, 2 * inner])
        own = g.op("Reshape", g.op("Slice", every, [first], [last], [1]), [tokens, count, 1])
        both, own = (g.op("Transpose", x, perm=[1, 0, 2]) for x in (both, own))
        y = product(g, _hidden(g, op, both, own), _some(g, op, 5, first, last))
        sums.append(g.op("ReduceSum", y, [0], keepdims=0))
    return sums[0] if len(sums) == 1 else g.op("Sum", *sums)


def _hidden(g: StaticContext, op: Op, both: V, share: V) -> V:
    """Products [...,2I] and routing weights [...,1] -> [...,I], rounded when a product takes it."""
    inner = size(op, 5, 2)
    gate, up = g.multi("Split", 2, both, [inner, inner], axis=-1)
    return g.op("Mul", limited_swiglu(g, gate, up, number(op, "limit")), share)


def _gathered(g: StaticContext, op: Op, index: int, experts: V) -> V:
    """The matrices of some experts as FLOAT [routes,rows,columns]."""
    codes, scales = (g.op("Gather", x, experts, axis=0) for x in (g.view(op, index), g.scales(op, index)))
    return _decoded(g, op, index, codes, scales)


def _some(g: StaticContext, op: Op, index: int, first: int, last: int) -> V:
    """The matrices of experts first .. last-1 as FLOAT [n,rows,columns]."""
    codes, scales = (g.op("Slice", x, [first], [last], [0]) for x in (g.view(op, index), g.scales(op, index)))
    return _decoded(g, op, index, codes, scales)


def _decoded(g: StaticContext, op: Op, index: int, codes: V, scales: V) -> V:
    scheme = g.scheme(op, index)
    assert scheme is not None
    return static_codes.decoded(g, codes, scales, scheme)
