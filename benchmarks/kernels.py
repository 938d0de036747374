"""Times the matrix products of the TVM emitter on each storage scheme, alone: no graph, no session.

Weights rotate through more copies than the caches hold, as the layers of a model do. Each round measures
every scheme once, in turn, so that all of them meet the same moods of the machine; figures are medians, with
the best beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent
BYTES = 1 << 29
"""Of all copies of one weight together, about: more than the last cache."""
SCHEMES = "f32,bf16,int8,int4,fp8,mxfp8,mxfp4,nvfp4"
TOPK = 6
ROWS = ("f32", "bf16", "split", "int8")

Arr = npt.NDArray[Any]


@dataclass
class Run:
    """One product in one scheme: `call(copy)` runs it once."""

    call: Callable[[int], object]
    copies: int
    read: int  # bytes of weights that one call reads
    products: int  # multiplications of one call
    seconds: list[float]  # of one call
    cpu: list[float]  # seconds of all threads together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--tokens", default="1,128")
    parser.add_argument(
        "--rows", choices=ROWS, default="f32", help="inputs; split: float32 as three BF16 numbers; int8:"
        " where codes are integers or FP4, else bf16"
    )  # fmt: skip
    parser.add_argument("--linear", default="2048x1024", help="N x K")
    parser.add_argument("--experts", default="16x704x1024", help="experts x inner x K")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--name", default="kernels", help="of the result file")
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read when TVM's runtime loads
    results = []
    for tokens in (int(t) for t in options.tokens.split(",")):
        for what in ("linear", "experts"):
            runs = {s: make(what, s, tokens, options) for s in options.schemes.split(",")}
            measure(runs, options.rounds)
            results += [row(what, tokens, name, run) for name, run in runs.items()]
    print(table(results))
    from run import machine

    report = {"machine": machine(), "options": vars(options), "results": results}
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{stamp}-{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")


def make(what: str, scheme: str, tokens: int, options: argparse.Namespace) -> Run:
    sizes = [int(n) for n in getattr(options, what).split("x")]
    make_run = linear if what == "linear" else experts
    return make_run(scheme, options.rows, tokens, *sizes)


def measure(runs: dict[str, Run], rounds: int) -> None:
    for run in runs.values():
        run.call(0)
    for _ in range(rounds):
        for run in runs.values():
            start, cpu = time.perf_counter(), time.process_time()
            for copy in range(run.copies):
                run.call(copy)
            run.seconds.append((time.perf_counter() - start) / run.copies)
            run.cpu.append((time.process_time() - cpu) / run.copies)


def row(what: str, tokens: int, scheme: str, run: Run) -> dict[str, Any]:
    typical, best = statistics.median(run.seconds), min(run.seconds)
    return {
        "product": what, "tokens": tokens, "scheme": scheme, "milliseconds": 1e3 * typical,
        "best_milliseconds": 1e3 * best, "cpu_milliseconds": 1e3 * statistics.median(run.cpu),
        "weight_bytes": run.read, "gb_per_s": run.read / typical / 1e9,
        "best_gb_per_s": run.read / best / 1e9,
        "gflop_per_s": 2 * run.products / typical / 1e9,
    }  # fmt: skip


COLUMNS = {"ms": "milliseconds", "best ms": "best_milliseconds", "CPU ms": "cpu_milliseconds"}


def table(results: list[dict[str, Any]]) -> str:
    """Each time with its ratio to that of bf16: above 1 is faster."""
    titles = [f"{title} | times bf16" for title in COLUMNS]
    lines = [f"| product | T | scheme | GB/s | GFLOP/s | {' | '.join(titles)} |"]
    lines.append("|---" * (5 + 2 * len(COLUMNS)) + "|")
    for r in results:
        same = [x for x in results if (x["product"], x["tokens"]) == (r["product"], r["tokens"])]
        base = next((x for x in same if x["scheme"] == "bf16"), same[0])
        rates = [f"{r['gb_per_s']:.1f}", f"{r['gflop_per_s']:.0f}"]
        cells = [r["product"], str(r["tokens"]), r["scheme"], *rates]
        for key in COLUMNS.values():
            cells += [f"{r[key]:.3f}", f"{base[key] / r[key]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- products


def linear(scheme: str, rows: str, tokens: int, n: int, k: int) -> Run:
    from dsv4c.targets.cpu.tvm.kernels import dense
    from dsv4c.targets.cpu.tvm.kernels.product import panel_width

    packing, arrays = stored(scheme, 1, n, k, panel_width(n))
    packing = taking(packing, rows)
    kernel = compiled(dense.grouped_linear(None, 1, k, n, packing))
    x, y = rows_in(packing, 1, tokens, k), tensor(np.zeros((1, tokens, n), np.float32))
    weights = [tensors(arrays) for _ in range(copies_of(arrays))]
    return Run(lambda i: kernel(x, *weights[i], y), len(weights), size(arrays), tokens * n * k, [], [])


def experts(scheme: str, rows: str, tokens: int, count: int, inner: int, k: int) -> Run:
    """Both halves; every token takes TOPK of the experts, so one token reads the panels of TOPK experts."""
    from dsv4c.targets.cpu.tvm.kernels import dense
    from dsv4c.targets.cpu.tvm.kernels.product import panel_width
    from dsv4c.targets.cpu.tvm.kernels.tiles import by_tiles

    packing, first = stored(scheme, count, 2 * inner, k, 2 * dense.PAIR)
    _, second = stored(scheme, count, k, inner, panel_width(k))
    packing = taking(packing, rows)
    hidden = compiled(dense.expert_hidden(count, k, inner, TOPK, 10.0, packing, packing))
    output = compiled(dense.expert_output(count, k, inner, TOPK, packing))
    sort = compiled(dense.expert_order(count, TOPK))
    rng = np.random.default_rng(1)
    ids = rng.permuted(np.tile(np.arange(count), (1, tokens, 1)), axis=-1)[..., :TOPK].astype(np.int32)
    routes, i32 = tokens * TOPK, np.int32
    order, starts = tensor(np.zeros(routes, i32)), tensor(np.zeros(count + 1, i32))
    sort(tensor(ids), tensor(np.array([tokens], i32)), order, starts)
    x = rows_in(packing, *((routes,) if by_tiles(packing) else (1, tokens)), k)
    gates, mid = tensor(normal(1, tokens, TOPK)), rows_in(packing, routes, inner)
    y = tensor(np.zeros((1, tokens, k), np.float32))
    weights = [(tensors(first), tensors(second)) for _ in range(copies_of(first + second))]

    def call(i: int) -> None:
        hidden(x, gates, order, starts, *weights[i][0], mid)
        output(mid, order, starts, *weights[i][1], y)

    used = len(np.unique(ids)) / count
    return Run(call, len(weights), int(used * size(first + second)), routes * 3 * inner * k, [], [])


def taking(packing: Any, rows: str) -> Any:
    """The packing for inputs as `--rows` says."""
    from dsv4c.ir.dtypes import DType

    if rows == "int8" and packing.code in (DType.I8, DType.I4X2, DType.F4E2M1X2):
        return replace(packing, coded=True)
    pieces = {"f32": 0, "bf16": 1, "split": 3, "int8": 1}[rows]
    return replace(packing, pieces=0 if packing.code is DType.F32 else pieces)


def rows_in(packing: Any, *shape: int) -> Any:
    """Rows as kernels take them: float32, the bits of BF16 pieces, or codes with scales."""
    from dsv4c.targets.cpu.tvm.kernels.rows import Rows

    form = Rows(packing, shape[-1])
    shape = form.shape(*shape[:-1])
    if packing.coded:
        return tensor(np.full(shape, 0x3F010203, np.uint32))  # codes 3, 2, 1, 63, and a scale of 0.504
    x = normal(*shape)
    return tensor((x.view(np.uint32) >> 16).astype(np.uint16) if packing.pieces else x)


def stored(scheme: str, count: int, n: int, k: int, width: int) -> tuple[Any, list[Arr]]:
    """How kernels take `count` normal matrices [n, k] in a scheme: packing; codes, block and row scales."""
    from dsv4c.ir import layouts
    from dsv4c.ir import weights as w
    from dsv4c.ir.dtypes import DType
    from dsv4c.ir.encode import encode
    from dsv4c.ir.formats import SCHEMES
    from dsv4c.targets import parse_target
    from dsv4c.targets.cpu.tvm.emit import simd_of
    from dsv4c.targets.cpu.tvm.kernels.packing import Packing

    s, simd, one = SCHEMES[scheme], simd_of(parse_target("cpu")[1]), np.ones(1, np.float32)
    found = encode(normal(n, k) * np.float32(k**-0.5), s)
    if s.plain:
        layout = w.panel if s.code is DType.F32 else layouts.lane_words
        return Packing(s.code, simd=simd), [made(layout, found.codes, s.code, width, count), one, one]
    assert s.scale is not None
    codes = made(layouts.lane_words, found.codes, s.code, width, count)
    rows = np.repeat(found.scales, s.block[0] or n, axis=0)[:n]
    scales = made(w.panel, rows, s.scale, width, count)
    per_row = s.block[1] == 0
    if per_row:
        return Packing(s.code, None, 0, True, simd), [codes, one, scales]
    tensor_scale = one
    if found.tensor_scale is not None:
        tensor_scale = made(w.panel, np.repeat(found.tensor_scale[None], n, axis=0), DType.F32, width, count)
    return Packing(s.code, s.scale, s.block[1], s.tensor_scale, simd), [codes, scales, tensor_scale]


def made(layout: Callable[..., Any], array: Arr, dtype: Any, width: int, count: int) -> Arr:
    """`count` times an array in a layout of panels, one after the other."""
    from dsv4c.ir import weights as w

    class Store:
        def read(self, _: str) -> Arr:
            return array

    panels = w.materialise(layout(w.source("m", dtype, array.shape), width), Store())
    return np.concatenate([panels] * count)


def copies_of(arrays: list[Arr]) -> int:
    return max(1, round(BYTES / size(arrays)))


def size(arrays: list[Arr]) -> int:
    return sum(a.nbytes for a in arrays)


def normal(*shape: int) -> Arr:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def tensors(arrays: list[Arr]) -> list[Any]:
    return [tensor(a) for a in arrays]


def tensor(array: Arr) -> Any:
    """An aligned copy."""
    import tvm_ffi

    from dsv4c.runtime.buffers import zeros

    copy = zeros(array.shape, array.dtype)
    copy[...] = array
    return tvm_ffi.from_dlpack(copy)


def compiled(kernel: Any) -> Any:
    import tvm

    from dsv4c.targets import parse_target
    from dsv4c.targets.cpu.tvm.emit import cross_attributes

    target = tvm.target.Target({"kind": "llvm", **cross_attributes(parse_target("cpu")[1])})
    return tvm.compile(kernel.with_attr("global_symbol", "main"), target=target)["main"]


if __name__ == "__main__":
    main()
