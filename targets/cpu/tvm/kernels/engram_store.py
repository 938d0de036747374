"""Kernels that decode table records as the runtime hands them over: a row's codes, its scales, then more."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import LANES, load_scalar, load_weight, ramp, weight_dtype


def engram_records_scaled(record: int, width: int, groups: int, columns: int):
    """records [B,S,columns,record] u8, the value of every code and every scale [256] -> [B,S,columns*width].

    A record begins with `width` codes and `groups` scales. A record of zeros gives zeros: its code is 0.
    """
    group = width // groups

    @T.prim_func(s_tir=True)
    def func(r: T.handle, cv: T.handle, sv: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        R = T.match_buffer(r, (B, S, columns, record), "uint8")
        CodeValue = T.match_buffer(cv, (256,), "float32")
        ScaleValue = T.match_buffer(sv, (256,), "float32")
        Y = T.match_buffer(y, (B, S, columns * width), "float32")
        Rf = T.decl_buffer((B * S * columns * record,), "uint8", data=R.data)
        Yf = T.decl_buffer((B * S * columns * width,), "float32", data=Y.data)
        for m in T.parallel(B * S):
            scale = T.alloc_buffer((1,), "float32", scope="local")
            for c in T.serial(columns):
                for g in T.serial(groups):
                    scale[0] = ScaleValue[
                        T.cast(Rf[(m * columns + c) * record + width + g], "int32")
                    ]
                    for j in T.serial(group):
                        Yf[(m * columns + c) * width + g * group + j] = (
                            CodeValue[T.cast(Rf[(m * columns + c) * record + g * group + j], "int32")]
                            * scale[0]
                        )

    return func


def engram_records_plain(record: int, width: int, columns: int, bf16: bool):
    """records [B,S,columns,record] of f32 or BF16 numbers -> [B,S,columns*width]; `record` counts numbers."""
    dtype, whole = weight_dtype(bf16), width // LANES * LANES

    @T.prim_func(s_tir=True)
    def func(r: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        R = T.match_buffer(r, (B, S, columns, record), dtype)
        Y = T.match_buffer(y, (B, S, columns * width), "float32")
        Rf = T.decl_buffer((B * S * columns * record,), dtype, data=R.data)
        Yf = T.decl_buffer((B * S * columns * width,), "float32", data=Y.data)
        for m in T.parallel(B * S):
            for c in T.serial(columns):
                for j in T.serial(whole // LANES):
                    Yf[ramp((m * columns + c) * width + j * LANES)] = load_weight(
                        Rf, (m * columns + c) * record + j * LANES, bf16
                    )
                for j in T.serial(width - whole):
                    Yf[(m * columns + c) * width + whole + j] = load_scalar(
                        Rf, (m * columns + c) * record + whole + j, bf16
                    )

    return func
