"""Functions of the compiled code that measure: a log of calls, and what the machine can do at most.

No step calls them; `runtime.profile` does.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from typing import Any

from tvm.ir import PointerType, PrimType
from tvm.script import tirx as T

from .kernels.packing import Simd
from .kernels.vec import LANES, ramp, splat, zeros

_WORDS = PointerType(PrimType("int64"))
_SYMBOL = "__tvm_ffi_"
"""What a packed function's name begins with in a library."""
_MONOTONIC = 1
_SUMS = {Simd.AMX: 12, Simd.AVX512_BF16: 12, Simd.AVX512: 12, Simd.AVX2: 6, Simd.NEON: 6}
"""Independent sums of 16 lanes: enough to hide the latency of a multiply-add, few enough for registers."""


def probes(simd: Simd) -> dict[str, Any]:
    """Name -> function."""
    found = {"read_memory": read_memory(), "multiply_add": multiply_add(_SUMS.get(simd, 3))}
    return {"log_call": log_call(), **{n: f.with_attr("global_symbol", n) for n, f in found.items()}}


def probes_meta(simd: Simd) -> dict[str, Any]:
    """`operations`: how many a round of `multiply_add` takes."""
    return {"operations": 2 * LANES * _SUMS.get(simd, 3)}


def log_call():
    """The instrument of a virtual machine, which calls it before and after every call.

    With one argument, the address of an int64 array [end, size, ...], it writes there from then on; address
    0 ends that. Else it appends three words, the address of the callee's name and the time of CLOCK_MONOTONIC
    in seconds and nanoseconds, and moves `end`, also where no words are left.

    It reads its arguments as tvm_ffi hands them over, two words each, so that a call takes no longer than a
    look at the clock.
    """

    @T.prim_func(s_tir=True)
    def func(
        own: T.handle("int64"), given: T.handle("int64"), count: T.int32, result: T.handle("int64")
    ) -> T.int32:
        T.func_attr({
            "calling_conv": 1, "tirx.is_entry_func": True, "global_symbol": _SYMBOL + "log_call",
        })  # fmt: skip
        slot: T.let[T.handle("int64")] = T.call_intrin(_WORDS, "tirx.tvm_static_handle")
        place = T.decl_buffer((1,), "int64", data=slot)
        args = T.decl_buffer((4,), "int64", data=given)
        out = T.decl_buffer((2,), "int64", data=result)
        if count == 1:
            place[0] = args[1]
        elif place[0] != T.int64(0):
            words: T.let[T.handle("int64")] = T.reinterpret(_WORDS, place[0])
            log = T.decl_buffer((2,), "int64", data=words)
            at: T.let[T.int64] = log[0]
            log[0] = at + T.int64(3)
            if at + T.int64(3) <= log[1]:
                log[at] = args[3]
                T.evaluate(
                    T.call_extern("int32", "clock_gettime", _MONOTONIC, T.address_of(log[at + T.int64(1)]))
                )
        out[0] = T.int64(1)
        out[1] = T.int64(0)
        return T.int32(0)

    return func


def read_memory():
    """x [parts, n] f32, n a multiple of 64 -> sums [parts, 16] f32; every part by one worker."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        P = T.int64()
        N = T.int64()
        X = T.match_buffer(x, (P, N), "float32")
        Y = T.match_buffer(y, (P, LANES), "float32")
        for p in T.parallel(P):
            total = T.alloc_buffer((4 * LANES,), "float32")
            for v in T.unroll(4):
                total[ramp(v * LANES)] = zeros()
            for i in T.serial(N // (4 * LANES)):
                for v in T.unroll(4):
                    total[ramp(v * LANES)] = (
                        total[ramp(v * LANES)] + X[p, ramp(i * (4 * LANES) + v * LANES)]
                    )
            Y[p, ramp(0)] = (
                total[ramp(0)] + total[ramp(LANES)] + total[ramp(2 * LANES)] + total[ramp(3 * LANES)]
            )

    return func


def multiply_add(sums: int):
    """x [2] f32, rounds i64 [1] -> y [parts, 16] f32; 2 * 16 * sums operations a round and part."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, rounds: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        P = T.int64()
        X = T.match_buffer(x, (2,), "float32")
        R = T.match_buffer(rounds, (1,), "int64")
        Y = T.match_buffer(y, (P, LANES), "float32")
        for p in T.parallel(P):
            total = T.alloc_buffer((sums * LANES,), "float32")
            for v in T.unroll(sums):
                total[ramp(v * LANES)] = splat(T.cast(v, "float32"))
            for _ in T.serial(R[0]):
                for v in T.unroll(sums):
                    total[ramp(v * LANES)] = total[ramp(v * LANES)] * splat(X[0]) + splat(X[1])
            Y[p, ramp(0)] = zeros()
            for v in T.unroll(sums):
                Y[p, ramp(0)] = Y[p, ramp(0)] + total[ramp(v * LANES)]

    return func
