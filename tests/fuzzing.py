"""Random graphs for the fuzzer: whole models of random configurations, and chains of random ops.

python tests/fuzzing.py --seconds 600        # as long as you like; prints the seed of what fails
python tests/fuzzing.py --seed 1234          # that one again
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from fuzzing_models import Rng, random_model, random_model_v41, random_vision
from fuzzing_models import pick as _pick

from dsv4c.ir import weights as w
from dsv4c.ir.clone import clone
from dsv4c.ir.dims import sym
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Builder, Module, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.text import parse_module, print_module
from dsv4c.ir.types import f32, i32
from dsv4c.ir.verify import verify
from dsv4c.passes import PASSES, Pass, parse_pipeline, run_pipeline
from dsv4c.passes.check import ResultCheck
from dsv4c.targets import TARGETS

B, T, CTX = sym("B"), sym("T"), sym("ctx")
MAKERS: tuple[Callable[[int], Module], ...]
"""What is fuzzed; each makes a module from a seed."""

# ------------------------------------------------------------------------------------- chains of ops


def random_graph(seed: int) -> Module:
    """A FUSED-level graph of random ops over a pool of values, with every result reachable from an output."""
    return _Chain(np.random.default_rng([2, seed])).build()


class _Chain:
    """Appends ops that fit what is there; the pool holds values of the shapes [B,T,d] and [B,T,h,d]."""

    def __init__(self, rng: Rng) -> None:
        self.rng, self.module = rng, Module("chain", Level.FUSED)
        self.b, self.count = Builder(self.module), 0
        self.tokens = self.b.input("tokens", i32(B, T))
        self.n_valid = self.b.input("n_valid", i32(B))
        self.pos = self.b.state("pos", i32(B))
        self.rows = [self.b.input("x", f32(B, T, 12)), self.b.input("y", f32(B, T, 12))]
        self.heads: list[Value] = []
        self.streams: list[Value] = []
        self.pres: list[Value] = []
        self.made: list[Value] = []

    def build(self) -> Module:
        makers: list[Callable[[], Value | None]] = [
            self.linear, self.linear, self.norm, self.add, self.scale, self.clamp, self.swiglu, self.split,
            self.head_norm, self.rotary, self.softplus, self.experts, self.embed, self.to_streams, self.mix,
            self.ring, self.duplicate, self.outside, self.indexer,
        ]  # fmt: skip
        for _ in range(int(self.rng.integers(4, 16))):
            self.count += 1
            self.b.loc = f"op{self.count}"
            made = _pick(self.rng, makers)()
            if made is not None:
                self.made.append(made)
        unread = [v for v in self.made if not v.uses and v not in self.module.output_values()]
        self.module.outputs |= {f"out{i}": v for i, v in enumerate(unread)}
        self.module.outputs["pos"] = self.b.op("advance", self.pos, self.n_valid)
        verify(self.module)
        return self.module

    def width(self, value: Value) -> int:
        d = value.type.shape[-1]
        assert isinstance(d, int)
        return d

    def row(self) -> Value:
        return _pick(self.rng, self.rows)

    def keep(self, value: Value) -> Value:
        {3: self.rows, 4: self.heads}[value.type.rank].append(value)
        return value

    def weight(self, *shape: int) -> Value:
        name = f"w{self.count}.{len(self.module.ops)}"
        dtype = _pick(self.rng, (DType.BF16, DType.F32, DType.F8E4M3))
        if len(shape) != 2 or dtype is not DType.F8E4M3:
            dtype = DType.F32 if dtype is DType.F8E4M3 else dtype
            return self.b.weight(w.source(name, dtype, shape), name)
        scale = w.source(f"{name}.scale", DType.F8E8M0, (-(-shape[0] // 8), -(-shape[1] // 8)))
        return self.b.weight(w.decode_fp8(w.source(name, dtype, shape), scale, (8, 8)), name)

    def linear(self) -> Value:
        x = self.row()
        return self.keep(
            self.b.op("linear", x, self.weight(int(_pick(self.rng, (6, 12, 16))), self.width(x)))
        )

    def norm(self) -> Value:
        x = self.row()
        w_ = self.b.weight(w.source(f"n{self.count}", DType.F32, (self.width(x),)), f"n{self.count}")
        return self.keep(self.b.op("rms_norm", x, w_, eps=1e-6))

    def add(self) -> Value | None:
        x = self.row()
        return self.keep(self.b.op("add", x, _pick(self.rng, [v for v in self.rows if v.type == x.type])))

    def scale(self) -> Value:
        return self.keep(self.b.op("scale", self.row(), factor=float(_pick(self.rng, (0.5, 1.0, -2.0)))))

    def clamp(self) -> Value:
        return self.keep(self.b.op("clamp", self.row(), low=-1.5, high=1.5))

    def swiglu(self) -> Value:
        x = self.row()
        other = _pick(self.rng, [v for v in self.rows if v.type == x.type])
        limit = float(_pick(self.rng, (1.0, 2.0)))
        gate = self.b.op("clamp", x, low=float("-inf"), high=limit)
        up = self.b.op("clamp", other, low=-limit, high=float(_pick(self.rng, (limit, 3.0))))
        return self.keep(self.b.op("swiglu", gate, up))

    def softplus(self) -> Value:
        return self.keep(self.b.op("sqrt_softplus", self.row()))

    def split(self) -> Value:
        x = self.row()
        return self.keep(self.b.op("split_heads", x, heads=2))

    def head_norm(self) -> Value | None:
        return (
            self.keep(self.b.op("unit_norm", _pick(self.rng, self.heads), eps=1e-6)) if self.heads else None
        )

    def rotary(self) -> Value:
        x = _pick(self.rng, [*self.rows, *self.heads])
        frequencies = self.b.weight(w.rope_frequencies(4, 10000.0), "rope")
        positions = self.b.op("positions", self.tokens, self.pos)
        cos, sin = self.b.multi("rope_angles", positions, frequencies).results
        return self.keep(self.b.op("rotary", x, cos, sin, inverse=bool(self.rng.random() < 0.5)))

    def embed(self) -> Value:
        return self.keep(self.b.op("embed", self.tokens, self.weight(9, 12)))

    def to_streams(self) -> Value:
        value = self.b.op("repeat_streams", self.row(), n=2)
        self.streams.append(value)
        return value

    def mixed(self, x: Value) -> list[Value]:
        names = zip(("fn", "base", "scale"), ((8, 2 * self.width(x)), (8,), (3,)), strict=True)
        operands = [
            self.b.weight(w.source(f"{n}{self.count}", DType.F32, s), f"{n}{self.count}") for n, s in names
        ]
        results = self.b.multi("hc_mix", x, *operands, eps=1e-6, norm_eps=1e-6, iters=3).results
        self.pres.append(results[0])
        return results

    def mix(self) -> Value | None:
        if not self.streams:
            return None
        x = _pick(self.rng, self.streams)
        pre, post, comb = self.mixed(x)
        y = self.b.op("hc_collapse", x, pre)
        self.streams.append(self.b.op("hc_expand", x, y, post, comb))
        self.keep(y)
        return self.streams[-1]

    def outside(self) -> Value | None:
        """A sub-layer that collapses by the weights of any mix so far, its own included."""
        if not self.streams:
            return None
        x = _pick(self.rng, self.streams)
        _, post, comb = self.mixed(x)
        w_ = self.b.weight(w.source(f"o{self.count}", DType.F32, (self.width(x),)), f"o{self.count}")
        y = self.b.op("rms_norm", self.b.op("hc_collapse", x, _pick(self.rng, self.pres)), w_, eps=1e-6)
        self.streams.append(self.b.op("hc_expand", x, y, post, comb))
        self.keep(y)
        return self.streams[-1]

    def indexer(self) -> Value:
        """Selected ids over entries of a ring of its own; now and then with candidates, or among some."""
        name, kind = f"keys{self.count}", int(self.rng.integers(4))
        q = self.b.op("split_heads", self.linear(), heads=2)
        d, ratio = self.width(q), int(_pick(self.rng, (1, 2)))
        keys = self.b.state(name, f32(B, CTX // ratio, d))
        self.module.outputs[name] = self.b.op("scale", keys, factor=1.0)
        x = self.row()
        weights = self.b.op("linear", x, self.weight(2, self.width(x)))
        scores = self.b.op("index_scores", q, weights, keys, self.pos, self.n_valid, ratio=ratio)
        block = {"size": int(self.rng.integers(1, 4)), "count": int(self.rng.integers(1, 4))}
        if kind > 1:
            blocks = self.b.op("candidate_blocks", scores, self.pos, self.n_valid, ratio=ratio, **block)
            self.made.append(blocks)
            if kind == 3:
                scores = self.b.op("index_restrict", scores, blocks, size=block["size"])
        return self.b.op("index_topk", scores, k=int(self.rng.integers(1, 5)))

    def experts(self) -> Value:
        x, count = self.row(), int(self.rng.integers(2, 5))
        d, k = self.width(x), int(self.rng.integers(1, count + 1))
        scores = self.b.op("sqrt_softplus", self.b.op("linear", x, self.weight(count, d)))
        bias = self.b.weight(w.source(f"b{self.count}", DType.F32, (count,)), f"b{self.count}")
        ids = self.b.op("route_topk", scores, bias, k=k)
        gates = self.b.op("route_weights", scores, ids, factor=1.5, eps=1e-20)
        label = f"R{self.count}"
        routed = self.b.multi("dispatch", x, ids, gates, self.n_valid, experts=count, label=label)
        limit, ys = 2.0, []
        odd = int(self.rng.integers(0, 2 * count))  # now and then one expert is of another kind
        for e in range(count):
            rows, gate = routed.results[2 * e : 2 * e + 2]
            high = 3.0 if e == odd else limit
            g = self.b.op("clamp", self.b.op("linear", rows, self.weight(8, d)), low=float("-inf"), high=high)
            u = self.b.op("clamp", self.b.op("linear", rows, self.weight(8, d)), low=-high, high=high)
            hidden = self.b.op("scale_rows", self.b.op("swiglu", g, u), gate)
            ys.append(self.b.op("linear", hidden, self.weight(d, 8)))
        return self.keep(self.b.op("combine", ids, self.n_valid, *ys))

    def ring(self) -> Value:
        x = self.row()
        name = f"ring{self.count}"
        ring = self.b.state(name, f32(B, int(self.rng.integers(1, 5)), self.width(x)))
        self.module.outputs[name] = self.b.op("ring_write", ring, x, self.pos, self.n_valid)
        return x

    def duplicate(self) -> Value | None:
        """The same op again, for common subexpressions."""
        ops = [op for op in self.module.ops if op.name in ("linear", "scale", "rms_norm")]
        if not ops:
            return None
        op = _pick(self.rng, ops)
        if op.operands[0].type.rank != 3 or op.operands[0].type.shape[0] != B:
            return None
        return self.keep(self.b.op(op.name, *op.operands, **op.attrs))


MAKERS = (random_graph, random_model, random_model_v41, random_vision)


# ------------------------------------------------------------------------------------------ the check


def simple_passes() -> list[Pass]:
    """Every pass that needs no option."""
    out = []
    for kind in PASSES.values():
        try:
            out.append(kind())
        except TypeError:
            continue
    return out


def check(module: Module) -> int:
    """Verify, print, parse, and run every pass that takes the module; returns how many changed it.

    Raises:
        AssertionError, Dsv4cError: what does not hold.
    """
    verify(module)
    text = print_module(module)
    assert print_module(parse_module(text)) == text, "what is printed does not read back"
    fired, known = 0, _Known()
    pipelines = [(p,) for p in simple_passes()]
    pipelines += map(parse_pipeline, dict.fromkeys(f.passes for t in TARGETS.values() for f in t.formats))
    for passes in pipelines:
        copy = clone(module)
        if copy.level not in passes[0].takes:
            run_pipeline(copy, parse_pipeline("fuse_swiglu"))
        if copy.level not in passes[0].takes or _needs_more(passes[0], module):
            continue
        if len(passes) == 1 and _leaves_alone(passes[0], copy):
            continue
        records = run_pipeline(copy, passes, check=_OnceForEachText(copy, known))
        fired += sum(r.changes for r in records)
        after = print_module(copy)
        assert print_module(parse_module(after)) == after, f"{passes}: what it leaves does not read back"
    return fired


_Known = dict[tuple[str, object], Any]
"""Text of a graph and the vocabulary it was asked with -> its results."""


class _OnceForEachText(ResultCheck):
    """Evaluates graphs of equal text once: pipelines begin alike, and made-up weights go by their names.

    Results that come back have no trace, which would fill memory, so an error may name the output alone.
    """

    def __init__(self, module: Module, known: _Known) -> None:
        super().__init__(module)
        self.known = known

    def _evaluate(self, module: Module) -> Any:
        key = (print_module(module), self.vocabulary)
        if key in self.known:
            return self.known[key]
        found = super()._evaluate(module)
        self.known[key] = replace(found, trace=[])
        return found


def _leaves_alone(p: Pass, module: Module) -> bool:
    """Whether the pass changes not a letter of the module, so that there is nothing to evaluate twice."""
    copy = clone(module)
    changes = sum(r.changes for r in run_pipeline(copy, (p,)))
    return not changes and print_module(copy) == print_module(module)


def _needs_more(p: Pass, module: Module) -> bool:
    """Passes that mean nothing without a file of statistics, or of a model that reads no text."""
    return p.name in NEEDS_FILES or (p.name in NEEDS_TEXT and "tokens" not in module.inputs)


NEEDS_FILES = frozenset({"layout_engram"})
NEEDS_TEXT = frozenset({"apply_reference_rounding"})


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz the passes with random graphs")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, help="this graph only")
    args = parser.parse_args()
    end, seed, fired = time.monotonic() + args.seconds, args.seed or 0, 0
    while args.seed is not None or time.monotonic() < end:
        for make in MAKERS:
            try:
                fired += check(make(seed))
            except Exception as error:
                print(f"{make.__name__}({seed}): {type(error).__name__}: {error}", file=sys.stderr)
                return 1
        seed += 1
        if args.seed is not None:
            break
    print(f"{len(MAKERS) * (seed - (args.seed or 0))} graphs, {fired} rewrites, no difference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
