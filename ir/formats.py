"""The storage schemes of weights: which codes and scales a matrix is kept in, and in what shapes.

A literal table of number formats and tilings; knows no tensor and no bytes. The rounding rules are in
`encode.py`, one function per scheme. Sources: model specification sections 2.1 and 3.1 to 3.3, OCP
microscaling formats 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from .dtypes import DType


@dataclass(frozen=True)
class Scheme:
    """How a float32 matrix [rows, cols] is stored.

    A value is float32(code * scale) of its block; with a tensor scale it is
    float32(float32(code * scale) * tensor_scale), whose inner product is exact.

    Attributes:
        name: key in `SCHEMES`.
        code: element type of the codes; a packed type holds two values a byte, even column in the low nibble.
        scale: element type of the scales, None for plain formats whose codes are the values.
        block: (rows, cols) that share one scale; 0 is the whole axis. The last blocks may be ragged.
        values_per_byte: values in one stored element of `code` (2 for packed types, else 1).
        tensor_scale: whether one more float32 scale belongs to each matrix. Its shape is [n], n dividing
            the rows: matrices joined along their rows keep a scale for each of the n equal row bands.
    """

    name: str
    code: DType
    scale: DType | None
    block: tuple[int, int] = (0, 0)
    values_per_byte: int = 1
    tensor_scale: bool = False

    @property
    def plain(self) -> bool:
        """Whether there are no scales."""
        return self.scale is None

    def tile(self, rows: int, cols: int) -> tuple[int, int]:
        """`block` with 0 replaced by the length of the axis."""
        return self.block[0] or rows, self.block[1] or cols

    def code_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Stored shape of the codes of [rows, cols]; an odd number of columns cannot be packed."""
        return rows, cols // self.values_per_byte

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the scales of [rows, cols]: ceilings of the divisions by `tile`."""
        high, wide = self.tile(rows, cols)
        return -(-rows // high), -(-cols // wide)

    def nbytes(self, rows: int, cols: int) -> int:
        """Stored bytes of one [rows, cols] matrix: codes, scales and tensor scale."""
        codes = rows * (cols // self.values_per_byte) * self.code.itemsize
        if self.scale is None:
            return codes
        high, wide = self.scale_shape(rows, cols)
        return codes + high * wide * self.scale.itemsize + 4 * self.tensor_scale


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("f32", DType.F32, None),
        Scheme("bf16", DType.BF16, None),
        Scheme("fp16", DType.F16, None),
        Scheme("int8", DType.I8, DType.F32, (1, 0)),
        Scheme("int4", DType.I4X2, DType.BF16, (1, 32), 2),
        Scheme("int4_g64", DType.I4X2, DType.BF16, (1, 64), 2),
        Scheme("int4_g128", DType.I4X2, DType.BF16, (1, 128), 2),
        Scheme("fp8", DType.F8E4M3, DType.F8E8M0, (128, 128)),
        Scheme("fp8_f32", DType.F8E4M3, DType.F32, (128, 128)),
        Scheme("fp8_fnuz", DType.F8E4M3FNUZ, DType.F8E8M0, (128, 128)),
        Scheme("mxfp8", DType.F8E4M3, DType.F8E8M0, (1, 32)),
        Scheme("mxfp4", DType.F4E2M1X2, DType.F8E8M0, (1, 32), 2),
        Scheme("nvfp4", DType.F4E2M1X2, DType.F8E4M3, (1, 16), 2, tensor_scale=True),
    )
}
"""Every scheme by name. The codes of `int8` are -127..127, those of `int4*` -7..7 (two's complement)."""
