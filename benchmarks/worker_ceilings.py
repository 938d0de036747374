"""Measures what the machine can do at most: reading memory, and multiplying float32 matrices.

    worker_ceilings.py THREADS [FILE...]

`read N` reads half a GiB N times with a compiled loop; `gemm N` multiplies by NumPy's BLAS, by PyTorch where
it is installed, and by the TVM emitter's own kernel, N times each; `file N` maps the Nth file and reads it
three times. The answer is the best that was seen.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from protocol import Result, serve

BYTES = 1 << 29
LANES = 128
SIZE = 2048
"""Of the square matrices of BLAS."""
PRODUCT = (512, 2048, 1024)
"""Tokens, N and K of the emitter's product."""


def reader(threads: int, data: np.ndarray) -> Callable[[], None]:
    """A call that reads int32 [threads, rows, LANES], each thread a part of its own."""
    import tvm
    import tvm_ffi
    from tvm.script import tirx as T

    from dsv4c.runtime.buffers import zeros
    from dsv4c.targets import parse_target
    from dsv4c.targets.cpu.tvm.emit import cross_attributes

    rows = data.shape[1]

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle):
        T.func_attr({"global_symbol": "main", "tir.noalias": True})
        data = T.match_buffer(a, (threads, rows, LANES), "int32")
        out = T.match_buffer(b, (threads, LANES), "int32")
        for t in T.parallel(threads):
            seen = T.alloc_buffer((LANES,), "int32")
            for v in T.vectorized(LANES):
                seen[v] = 0
            for i in range(rows):
                for v in T.vectorized(LANES):
                    seen[v] = seen[v] ^ data[t, i, v]
            for v in T.vectorized(LANES):
                out[t, v] = seen[v]

    target = tvm.target.Target({"kind": "llvm", **cross_attributes(parse_target("cpu")[1])})
    function = tvm.compile(main, target=target)["main"]
    given = tvm_ffi.from_dlpack(data), tvm_ffi.from_dlpack(zeros((threads, LANES), np.dtype(np.int32)))
    return lambda: function(*given)


def memory(threads: int) -> np.ndarray:
    """`BYTES` for `reader`, ones."""
    from dsv4c.runtime.buffers import zeros

    data = zeros((threads, BYTES // (4 * LANES * threads), LANES), np.dtype(np.int32))
    data[...] = 1
    return data


def mapped(threads: int, path: str) -> np.ndarray:
    """A file for `reader`, but for what does not fill a line of it."""
    with open(path, "rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    rows = len(held) // (4 * LANES * threads)
    return np.frombuffer(held, np.int32, threads * rows * LANES).reshape(threads, rows, LANES)


def products(threads: int) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Name -> operations of one product, and a call that does it."""
    from dsv4c.targets import parse_target
    from dsv4c.targets.cpu.tvm.products import Maker

    a, b = (np.random.default_rng(i).standard_normal((SIZE, SIZE), np.float32) for i in range(2))
    tokens, n, k = PRODUCT
    own = Maker(parse_target("cpu")[1]).linear("f32", "f32", tokens, n, k)
    found: dict[str, tuple[float, Callable[[], Any]]] = {
        "numpy": (2.0 * SIZE**3, lambda: a @ b),
        "tvm emitter": (2.0 * tokens * n * k, lambda: own.call(0)),
    }
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(threads)
        x, y = torch.from_numpy(a), torch.from_numpy(b)
        found["torch"] = 2.0 * SIZE**3, lambda: x @ y
    return found


def best_of(call: Callable[[], Any], repeat: int) -> float:
    """Seconds."""
    found = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    threads = int(sys.argv[1])
    os.environ["TVM_NUM_THREADS"] = str(threads)  # read when TVM's runtime loads
    read, multiply = reader(threads, memory(threads)), products(threads)

    def measure_read(repeat: int) -> Result:
        return {"gb_per_s": BYTES / best_of(read, repeat) / 1e9}

    def measure_file(number: int) -> Result:
        data = mapped(threads, sys.argv[2 + number])
        return {"gb_per_s": data.nbytes / best_of(reader(threads, data), 3) / 1e9}

    def measure_gemm(repeat: int) -> Result:
        rates = {name: flops / best_of(call, repeat) / 1e9 for name, (flops, call) in multiply.items()}
        return {"gflop_per_s": max(rates.values()), "by": rates}

    serve({"read": measure_read, "gemm": measure_gemm, "file": measure_file})


if __name__ == "__main__":
    main()
