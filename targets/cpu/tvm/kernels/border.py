"""The border between two sub-layers in one kernel: expand, mix, collapse, normalise (section 4).

A token is one piece of work, and so is a stream of it where a single token brings a large projection; a small
one stays on the calling thread, as waking a second costs more than its half of the work. Every sum has one
order whatever the batch: columns within a stream by chain, chains in order, then streams in order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from .vec import LANES, exp, ramp, sigmoid, splat, weight_dtype, zeros

LINE = 8
"""Lanes of the projection: the 24 rows of four streams are three vectors, without padding."""
CHAINS = 4
"""Partial sums of a stream: column j goes to sum j mod CHAINS, or each step would wait for the last."""
WORTH_A_THREAD = 1 << 17
"""Bytes of a projection from which a single token's streams are spread over threads."""


@dataclass(frozen=True)
class BorderShape:
    """Static facts of a border: streams, width, the epsilons of mix and norms, Sinkhorn iterations, whether
    the projection is stored as BF16, and whether the streams are collapsed by weights from outside.
    """

    n: int
    d: int
    bf16: bool
    eps: float
    norm_eps: float
    iters: int
    out_eps: float
    given: bool = False

    @property
    def rows(self) -> int:
        return self.n * (2 + self.n)

    @property
    def width(self) -> int:
        """Rows of the projection, padded to whole vectors."""
        return -(-self.rows // LINE) * LINE

    @property
    def spread(self) -> bool:
        """Whether the streams of a single token are worth several threads."""
        return self.n * self.d * self.width * (2 if self.bf16 else 4) >= WORTH_A_THREAD


def _line(start):
    return T.ramp(start, 1, LINE)


def _load(buffer, index, bf16: bool):
    """LINE weights as float32."""
    if not bf16:
        return buffer[_line(index)]
    bits = T.shift_left(T.cast(buffer[_line(index)], f"uint32x{LINE}"), T.broadcast(T.uint32(16), LINE))
    return T.reinterpret(f"float32x{LINE}", bits)


def _measure(a: BorderShape):
    """An inline `measure(m, i, Xf, Wf, Part)`: stream i of token m by its columns of the projection, and the
    sum of its squares, into Part[i * (width + 1)].
    """
    n, d, width, bf16 = a.n, a.d, a.width, a.bf16
    vecs, whole = width // LINE, d // LANES * LANES

    @T.inline
    def step(sums, m, i, u, j, Xf, Wf):
        for v in T.unroll(vecs):
            sums[_line((u * vecs + v) * LINE)] = sums[_line((u * vecs + v) * LINE)] + _load(
                Wf, (i * d + j) * width + v * LINE, bf16
            ) * T.broadcast(Xf[(m * n + i) * d + j], LINE)

    @T.inline
    def measure(m, i, Xf, Wf, Part):
        sums = T.alloc_buffer((CHAINS * width,), "float32")
        square = T.alloc_buffer((LANES,), "float32")
        total = T.alloc_buffer((1,), "float32")
        for u in T.unroll(CHAINS * vecs):
            sums[_line(u * LINE)] = T.broadcast(T.float32(0), LINE)
        for c in T.serial(d // CHAINS):
            for u in T.unroll(CHAINS):
                step(sums, m, i, u, c * CHAINS + u, Xf, Wf)
        for u in T.unroll(d % CHAINS):
            step(sums, m, i, u, d // CHAINS * CHAINS + u, Xf, Wf)
        for u in T.unroll(CHAINS - 1):
            for v in T.unroll(vecs):
                sums[_line(v * LINE)] = sums[_line(v * LINE)] + sums[_line(((u + 1) * vecs + v) * LINE)]
        for v in T.unroll(vecs):
            Part[_line(i * (width + LINE) + v * LINE)] = sums[_line(v * LINE)]
        square[ramp(0)] = zeros()
        for j in T.serial(d // LANES):
            square[ramp(0)] = square[ramp(0)] + (
                Xf[ramp((m * n + i) * d + j * LANES)] * Xf[ramp((m * n + i) * d + j * LANES)]
            )
        total[0] = T.float32(0)
        for j in T.serial(d % LANES):
            total[0] = total[0] + Xf[(m * n + i) * d + whole + j] * Xf[(m * n + i) * d + whole + j]
        for j in T.unroll(LANES):
            total[0] = total[0] + square[j]
        Part[i * (width + LINE) + width] = total[0]

    return measure


def _finish(a: BorderShape):
    """An inline `finish(m, Part, Xf, Base, Scale, G, Gf, Yf, Postf, Combf, Pref)`: what follows the streams.

    Pref takes the collapse weights that the mix makes; with `a.given` those of Gf are used in their place.
    """
    n, d, k, width = a.n, a.d, a.n * a.d, a.width
    whole = d // LANES * LANES

    @T.inline
    def softmax_rows(mat, acc, rho, Base, Scale):
        top = T.alloc_buffer((1,), "float32")
        for i in T.unroll(n):
            top[0] = T.min_value("float32")
            for j in T.unroll(n):
                mat[i * n + j] = acc[2 * n + i * n + j] * rho[0] * Scale[2] + Base[2 * n + i * n + j]
                top[0] = T.max(top[0], mat[i * n + j])
            for j in T.unroll(n):
                mat[i * n + j] = exp(mat[i * n + j] - top[0])
            top[0] = T.float32(0)
            for j in T.unroll(n):
                top[0] = top[0] + mat[i * n + j]
            for j in T.unroll(n):
                mat[i * n + j] = mat[i * n + j] / top[0] + T.float32(a.eps)

    @T.inline
    def divide(mat, line, across, along):
        """Each line of n entries, `along` apart and starting `across` apart, by its sum."""
        for i in T.unroll(n):
            line[i] = mat[i * across]
        for j in T.unroll(n - 1):
            for i in T.unroll(n):
                line[i] = line[i] + mat[i * across + (j + 1) * along]
        for i in T.unroll(n):
            line[i] = T.float32(1) / (line[i] + T.float32(a.eps))
        for j in T.unroll(n):
            for i in T.unroll(n):
                mat[i * across + j * along] = mat[i * across + j * along] * line[i]

    @T.inline
    def collapse(m, Xf, G, Yf, weight):
        """Yf = norm of the streams' sum, weighted by `weight`."""
        square = T.alloc_buffer((LANES,), "float32")
        total = T.alloc_buffer((1,), "float32")
        square[ramp(0)] = zeros()
        for j in T.serial(d // LANES):
            row = T.alloc_buffer((LANES,), "float32")
            row[ramp(0)] = Xf[ramp(m * k + j * LANES)] * splat(weight[0])
            for i in T.unroll(n - 1):
                row[ramp(0)] = row[ramp(0)] + Xf[ramp(m * k + (i + 1) * d + j * LANES)] * splat(weight[i + 1])
            square[ramp(0)] = square[ramp(0)] + row[ramp(0)] * row[ramp(0)]
            Yf[ramp(m * d + j * LANES)] = row[ramp(0)]
        total[0] = T.float32(0)
        for j in T.serial(d % LANES):
            Yf[m * d + whole + j] = Xf[m * k + whole + j] * weight[0]
            for i in T.unroll(n - 1):
                Yf[m * d + whole + j] = (
                    Yf[m * d + whole + j] + Xf[m * k + (i + 1) * d + whole + j] * weight[i + 1]
                )
            total[0] = total[0] + Yf[m * d + whole + j] * Yf[m * d + whole + j]
        for j in T.unroll(LANES):
            total[0] = total[0] + square[j]
        total[0] = T.float32(1) / T.sqrt(total[0] / T.float32(d) + T.float32(a.out_eps))
        for j in T.serial(d):
            Yf[m * d + j] = Yf[m * d + j] * total[0] * G[j]

    def chosen(own, Gf, index):
        return Gf[index] if a.given else own

    @T.inline
    def finish(m, Part, Xf, Base, Scale, G, Gf, Yf, Postf, Combf, Pref):
        acc = T.alloc_buffer((width,), "float32")
        rho = T.alloc_buffer((1,), "float32")
        mat = T.alloc_buffer((n * n,), "float32")
        line = T.alloc_buffer((n,), "float32")
        weight = T.alloc_buffer((n,), "float32")
        for v in T.unroll(width // LINE):
            acc[_line(v * LINE)] = Part[_line(v * LINE)]
        rho[0] = Part[width]
        for i in T.unroll(n - 1):
            for v in T.unroll(width // LINE):
                acc[_line(v * LINE)] = acc[_line(v * LINE)] + Part[_line((i + 1) * (width + LINE) + v * LINE)]
            rho[0] = rho[0] + Part[(i + 1) * (width + LINE) + width]
        rho[0] = T.float32(1) / T.sqrt(rho[0] / T.float32(k) + T.float32(a.norm_eps))
        for i in T.unroll(n):
            Pref[m * n + i] = sigmoid(acc[i] * rho[0] * Scale[0] + Base[i]) + T.float32(a.eps)
            weight[i] = chosen(Pref[m * n + i], Gf, m * n + i)
            Postf[m * n + i] = T.float32(2) * sigmoid(acc[n + i] * rho[0] * Scale[1] + Base[n + i])
        softmax_rows(mat, acc, rho, Base, Scale)
        divide(mat, line, 1, n)
        for _ in T.serial(a.iters - 1):
            divide(mat, line, n, 1)
            divide(mat, line, 1, n)
        for i in T.unroll(n * n):
            Combf[m * n * n + i] = mat[i]
        collapse(m, Xf, G, Yf, weight)

    return finish


def _expand(a: BorderShape):
    """An inline `expand(m, to, Xf, Ff, Of, Cf, Zf)`: stream `to` of token m behind the sub-layer before."""
    n, d = a.n, a.d
    whole = d // LANES * LANES

    @T.inline
    def expand(m, to, Xf, Ff, Of, Cf, Zf):
        comb = T.alloc_buffer((n + 1,), "float32")
        row = T.alloc_buffer((LANES,), "float32")
        comb[n] = Of[m * n + to]
        for i in T.unroll(n):
            comb[i] = Cf[(m * n + i) * n + to]
        for j in T.serial(d // LANES):
            row[ramp(0)] = Ff[ramp(m * d + j * LANES)] * splat(comb[n])
            for i in T.unroll(n):
                row[ramp(0)] = row[ramp(0)] + Xf[ramp((m * n + i) * d + j * LANES)] * splat(comb[i])
            Zf[ramp((m * n + to) * d + j * LANES)] = row[ramp(0)]
        for j in T.serial(d % LANES):
            row[0] = Ff[m * d + whole + j] * comb[n]
            for i in T.unroll(n):
                row[0] = row[0] + Xf[(m * n + i) * d + whole + j] * comb[i]
            Zf[(m * n + to) * d + whole + j] = row[0]

    return expand


def _given(a: BorderShape, b, s):
    """Shape of the collapse weights from outside; one row that nobody reads where there are none."""
    return (b, s, a.n) if a.given else (1, 1, a.n)


def _product(sizes):
    return sizes[0] * sizes[1] * sizes[2]


def hc_pre(a: BorderShape):
    """X [B,S,n,d], fn packed [1,n*d,width], base, scale [3], w [d], given [B,S,n] (never read without
    `a.given`) -> Y [B,S,d], post [B,S,n], comb [B,S,n,n], the mix's own collapse weights [B,S,n].
    """
    n, d, k, width = a.n, a.d, a.n * a.d, a.width
    measure, finish = _measure(a), _finish(a)

    @T.prim_func(s_tir=True)
    def func(
        x: T.handle, w: T.handle, bs: T.handle, sc: T.handle, g: T.handle, gi: T.handle, y: T.handle,
        o: T.handle, c: T.handle, pr: T.handle,
    ):  # fmt: skip
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, n, d), "float32")
        W = T.match_buffer(w, (1, k, width), weight_dtype(a.bf16))
        Base = T.match_buffer(bs, (a.rows,), "float32")
        Scale = T.match_buffer(sc, (3,), "float32")
        G = T.match_buffer(g, (d,), "float32")
        Given = T.match_buffer(gi, _given(a, B, S), "float32")
        Y = T.match_buffer(y, (B, S, d), "float32")
        Post = T.match_buffer(o, (B, S, n), "float32")
        Comb = T.match_buffer(c, (B, S, n, n), "float32")
        Pre = T.match_buffer(pr, (B, S, n), "float32")
        Xf = T.decl_buffer((B * S * k,), "float32", data=X.data)
        Wf = T.decl_buffer((k * width,), weight_dtype(a.bf16), data=W.data)
        Yf = T.decl_buffer((B * S * d,), "float32", data=Y.data)
        Postf = T.decl_buffer((B * S * n,), "float32", data=Post.data)
        Combf = T.decl_buffer((B * S * n * n,), "float32", data=Comb.data)
        Pref = T.decl_buffer((B * S * n,), "float32", data=Pre.data)
        Gf = T.decl_buffer((_product(_given(a, B, S)),), "float32", data=Given.data)
        if B * S == 1:
            one = T.alloc_buffer((n * (width + LINE),), "float32")
            if a.spread:
                for i in T.parallel(n):
                    measure(0, i, Xf, Wf, one)
            else:
                for i in T.serial(n):
                    measure(0, i, Xf, Wf, one)
            finish(0, one, Xf, Base, Scale, G, Gf, Yf, Postf, Combf, Pref)
        else:
            for m in T.parallel(B * S):
                part = T.alloc_buffer((n * (width + LINE),), "float32")
                for i in T.serial(n):
                    measure(m, i, Xf, Wf, part)
                finish(m, part, Xf, Base, Scale, G, Gf, Yf, Postf, Combf, Pref)

    return func


def hc_post_pre(a: BorderShape):
    """X [B,S,n,d], f [B,S,d], post [B,S,n], comb [B,S,n,n] of the sub-layer before, then as `hc_pre`
    -> Z [B,S,n,d] expanded streams, and the results of `hc_pre` on them.
    """
    n, d, k, width = a.n, a.d, a.n * a.d, a.width
    measure, finish, expand = _measure(a), _finish(a), _expand(a)

    @T.prim_func(s_tir=True)
    def func(
        x: T.handle, f: T.handle, po: T.handle, pc: T.handle, w: T.handle, bs: T.handle, sc: T.handle,
        g: T.handle, gi: T.handle, z: T.handle, y: T.handle, o: T.handle, c: T.handle, pr: T.handle,
    ):  # fmt: skip
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, n, d), "float32")
        F = T.match_buffer(f, (B, S, d), "float32")
        O = T.match_buffer(po, (B, S, n), "float32")  # noqa: E741
        C = T.match_buffer(pc, (B, S, n, n), "float32")
        W = T.match_buffer(w, (1, k, width), weight_dtype(a.bf16))
        Base = T.match_buffer(bs, (a.rows,), "float32")
        Scale = T.match_buffer(sc, (3,), "float32")
        G = T.match_buffer(g, (d,), "float32")
        Given = T.match_buffer(gi, _given(a, B, S), "float32")
        Z = T.match_buffer(z, (B, S, n, d), "float32")
        Y = T.match_buffer(y, (B, S, d), "float32")
        Post = T.match_buffer(o, (B, S, n), "float32")
        Comb = T.match_buffer(c, (B, S, n, n), "float32")
        Pre = T.match_buffer(pr, (B, S, n), "float32")
        Xf = T.decl_buffer((B * S * k,), "float32", data=X.data)
        Ff = T.decl_buffer((B * S * d,), "float32", data=F.data)
        Of = T.decl_buffer((B * S * n,), "float32", data=O.data)
        Cf = T.decl_buffer((B * S * n * n,), "float32", data=C.data)
        Wf = T.decl_buffer((k * width,), weight_dtype(a.bf16), data=W.data)
        Zf = T.decl_buffer((B * S * k,), "float32", data=Z.data)
        Yf = T.decl_buffer((B * S * d,), "float32", data=Y.data)
        Postf = T.decl_buffer((B * S * n,), "float32", data=Post.data)
        Combf = T.decl_buffer((B * S * n * n,), "float32", data=Comb.data)
        Pref = T.decl_buffer((B * S * n,), "float32", data=Pre.data)
        Gf = T.decl_buffer((_product(_given(a, B, S)),), "float32", data=Given.data)
        if B * S == 1:
            one = T.alloc_buffer((n * (width + LINE),), "float32")
            if a.spread:
                for i in T.parallel(n):
                    expand(0, i, Xf, Ff, Of, Cf, Zf)
                    measure(0, i, Zf, Wf, one)
            else:
                for i in T.serial(n):
                    expand(0, i, Xf, Ff, Of, Cf, Zf)
                    measure(0, i, Zf, Wf, one)
            finish(0, one, Zf, Base, Scale, G, Gf, Yf, Postf, Combf, Pref)
        else:
            for m in T.parallel(B * S):
                part = T.alloc_buffer((n * (width + LINE),), "float32")
                for i in T.serial(n):
                    expand(m, i, Xf, Ff, Of, Cf, Zf)
                    measure(m, i, Zf, Wf, part)
                finish(m, part, Zf, Base, Scale, G, Gf, Yf, Postf, Combf, Pref)

    return func
