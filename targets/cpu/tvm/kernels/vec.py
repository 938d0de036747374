"""Vector expressions shared by the kernels: 16 float32 lanes, loads of F32 and BF16, exp and sigmoid.

LLVM splits 16 lanes for machines with narrower vectors, so every kernel is correct everywhere.
"""

# TIR expressions have no static types; these helpers are the one place that builds them by hand.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

LANES = 16
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""exp(r) = 1 + r + r^2 p(r) for |r| <= ln 2 / 2: Cephes, `expf`, highest power first."""
_ROUND = 12582912.0
"""1.5 * 2^23: the sum with a small number holds its nearest integer in the low bits."""


def ramp(start):
    """LANES consecutive indices."""
    return T.ramp(start, 1, LANES)


def lanes_from(start, lanes: int):
    """The place of `lanes` numbers from `start` on."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def of_lanes(dtype: str, lanes: int) -> str:
    """The type of a vector, or of a number."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat_u32(x: int, lanes: int = LANES):
    return T.uint32(x) if lanes == 1 else T.broadcast(T.uint32(x), lanes)


def by_vectors(count: int, body, *args) -> None:
    """`body(i, lanes, *args)` for `count` neighbouring numbers: vectors, then what is left one by one."""
    if count >= LANES:
        with T.serial(0, count // LANES) as i:
            body(i * LANES, LANES, *args)
    if count % LANES:
        with T.serial(0, count % LANES) as i:
            body(count // LANES * LANES + i, 1, *args)


def move(j, lanes: int, y, y_at, x, x_at) -> None:
    """A body for `by_vectors`: y[y_at + j] = x[x_at + j]."""
    T.buffer_store(y, x[lanes_from(x_at + j, lanes)], [lanes_from(y_at + j, lanes)])


def splat(x):
    """One scalar in every lane."""
    return T.broadcast(x, LANES)


def zeros():
    return T.broadcast(T.float32(0), LANES)


def load_weight(buffer, index, bf16: bool):
    """16 weights as float32 from a flat buffer of float32 or of BF16 bits."""
    if not bf16:
        return buffer[ramp(index)]
    bits = T.shift_left(T.cast(buffer[ramp(index)], "uint32x16"), T.broadcast(T.uint32(16), LANES))
    return T.reinterpret("float32x16", bits)


def load_scalar(buffer, index, bf16: bool):
    """One weight as float32."""
    if not bf16:
        return buffer[index]
    return T.reinterpret("float32", T.shift_left(T.cast(buffer[index], "uint32"), T.uint32(16)))


def exp(x):
    """e^x of float32, one or any number of lanes, within 2 ulp; no call of a library, so lanes stay lanes.

    0 at -inf, inf where it overflows, NaN at NaN, exactly 1 at 0; denormal results are right too. The result
    in a lane does not depend on the number of lanes.
    """
    number, lanes = x.ty, x.ty.dtype.lanes

    def all_(value):
        return value if lanes == 1 else T.broadcast(value, lanes)

    def f32(value):
        return all_(T.float32(value))

    def power(n):
        """2^n for -127 < n < 128."""
        bits = T.shift_left(n + all_(T.int32(127)), all_(T.int32(23)))
        return T.reinterpret(str(number), bits)

    bounded, shifted, rest, n, half = (
        tirx.Var(name, type_)
        for name, type_ in zip("xzrnh", [number] * 3 + [str(number).replace("float", "int")] * 2, strict=True)
    )
    whole = shifted - f32(_ROUND)
    p = f32(_EXP[0])
    for factor in _EXP[1:]:
        p = p * rest + f32(factor)
    result = p * (rest * rest) + rest + f32(1)
    result = result * power(half) * power(n - half)
    for name, value in (
        (half, T.shift_right(n, all_(T.int32(1)))),
        (n, T.reinterpret(str(n.ty), shifted) - all_(T.int32(0x4B400000))),
        (rest, bounded - whole * f32(0.693359375) - whole * f32(-2.12194440e-4)),
        (shifted, bounded * f32(1.4426950408889634) + f32(_ROUND)),
        (bounded, T.min(f32(89), T.max(f32(-104), x))),  # in this order NaN stays
    ):
        result = tirx.Let(name, value, result)
    return result


def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to inf where the result is 0, as it should."""
    return T.float32(1) / (T.float32(1) + exp(T.float32(0) - x))


def weight_dtype(bf16: bool) -> str:
    """How TIR sees the storage of a weight."""
    return "uint16" if bf16 else "float32"


def shape(*dims):
    """A buffer shape; None leaves an axis out, for kernels that serve rank 3 and rank 4."""
    return tuple(d for d in dims if d is not None)
