"""Functions of tile registers as LLVM IR: TVM has no statements for them. What a kernel imports is inlined.

Registers 0 to 3 are sums of m x n tiles, row by row; from 4 on tiles of rows of X, one for each of m or for
each piece of theirs; 7, or 6 and 7 in turn, tiles of a panel. `config` comes first, `release` last; in
between `begin`, `steps` and `end` of one `Block`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

HIGH = 16
"""Most rows of a tile."""
COLUMNS = 32
"""Of a tile of X, and of BF16 numbers that a row of a panel's tile holds for 16 rows of the matrix."""
_ROW = 64
"""Bytes of a tile's row."""
_ROWS = 4
LINE = 64
"""Bytes that one request brings."""

_HEAD = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define i32 @dsv4c_amx_config_PIECES(i32 %high) {
  %at = alloca [64 x i8], align 64
  store <64 x i8> zeroinitializer, ptr %at, align 64
  store i8 1, ptr %at, align 64
  %rows = trunc i32 %high to i8
TILES
  call void @llvm.x86.ldtilecfg(ptr %at)
  ret i32 0
}

define i32 @dsv4c_amx_release() {
  call void @llvm.x86.tilerelease()
  ret i32 0
}
"""


@dataclass(frozen=True)
class Block:
    """m x n tiles of sums, and the products that each step adds to them.

    Attributes:
        pieces: of X; with more than one m is 1.
    """

    m: int
    n: int
    pieces: int = 1

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}_{self.pieces}"


    @property
    def tiles(self) -> int:
        """Of X, that a step loads."""
        return max(self.m, self.pieces)


def _config(pieces: int) -> str:
    """`config_N(rows)` for N pieces: tiles of X and of sums have so many rows, those of a panel 16 words."""
    tiles = {tile: (HIGH if tile in _panel_tiles(pieces) else "%rows", _ROW) for tile in range(8)}
    return _HEAD.replace("TILES", _sizes(tiles)).replace("PIECES", str(pieces))


def _sizes(tiles: dict[int, tuple[int | str, int]]) -> str:
    """Stores into a configuration at %at: rows of every tile, and bytes of each."""
    lines = []
    for tile, (rows, columns) in tiles.items():
        lines += [
            f"  %c{tile} = getelementptr i8, ptr %at, i64 {16 + 2 * tile}",
            f"  store i16 {columns}, ptr %c{tile}",
            f"  %r{tile} = getelementptr i8, ptr %at, i64 {48 + tile}",
            f"  store i8 {rows}, ptr %r{tile}",
        ]
    return "\n".join(lines)


_CODES = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbssd(i8, i8, i8)

define i32 @dsv4c_codes_config_COLUMNS(i32 %high) {
  %at = alloca [64 x i8], align 64
  store <64 x i8> zeroinitializer, ptr %at, align 64
  store i8 1, ptr %at, align 64
  %rows = trunc i32 %high to i8
TILES
  call void @llvm.x86.ldtilecfg(ptr %at)
  ret i32 0
}

define i32 @dsv4c_codes_release() {
  call void @llvm.x86.tilerelease()
  ret i32 0
}

define i32 @dsv4c_codes_block_COLUMNSxVECS(ptr %x, i64 %xs, ptr %w, ptr %c, i64 %ws) {
  call void @llvm.x86.tileloadd64(i8 4, ptr %x, i64 %xs)
BLOCK
  ret i32 0
}
"""


@cache
def codes_library(columns: int, vecs: int) -> str:
    """Products of INT8 codes, of up to 16 rows by `columns` columns of 16 `vecs` rows of a matrix.

    config_COLUMNS(rows); release(); block_COLUMNSxVECS(x, x stride, panel, sums, stride): the sums of
    products as int32; panel and sums have rows of `stride` bytes, those of the panel hold four columns of
    each row of the matrix.
    """
    tiles: dict[int, tuple[int | str, int]] = {tile: ("%rows", _ROW) for tile in range(4)}
    tiles |= {4: ("%rows", columns)} | {tile: (columns // 4, _ROW) for tile in range(5, 8)}
    lines = []
    for v in range(vecs):
        panel = 5 + v % 3
        lines += [
            f"  %w{v} = getelementptr i8, ptr %w, i64 {_ROW * v}",
            f"  %c{v} = getelementptr i8, ptr %c, i64 {_ROW * v}",
            f"  call void @llvm.x86.tileloadd64(i8 {panel}, ptr %w{v}, i64 %ws)",
            f"  call void @llvm.x86.tilezero(i8 {v})",
            f"  call void @llvm.x86.tdpbssd(i8 {v}, i8 4, i8 {panel})",
        ]
    lines += [f"  call void @llvm.x86.tilestored64(i8 {v}, ptr %c{v}, i64 %ws)" for v in range(vecs)]
    text = _CODES.replace("COLUMNS", str(columns)).replace("VECS", str(vecs))
    return text.replace("TILES", _sizes(tiles)).replace("BLOCK", "\n".join(lines))


def _panel_tiles(pieces: int) -> range:
    return range(7, 8) if pieces > 2 else range(6, 8)


def _each_sum(block: Block, instruction: str) -> str:
    """An instruction for every tile of sums; %c is the first, 16 rows of stride %cs apart."""
    lines = ["  %down = shl i64 %cs, 4"]
    for i in range(block.m):
        lines.append(f"  %p{i} = getelementptr i8, ptr %c, i64 {'%down' if i else 0}")
        for j in range(block.n):
            lines.append(f"  %p{i}_{j} = getelementptr i8, ptr %p{i}, i64 {_ROW * j}")
            lines.append(f"  call void @llvm.x86.{instruction}(i8 {i * block.n + j}, ptr %p{i}_{j}, i64 %cs)")
    return "\n".join(lines)


def _loads_of_rows(block: Block) -> list[str]:
    lines = ["  %x0 = getelementptr i8, ptr %x, i64 0"]
    for t in range(block.tiles):
        if t:
            lines.append(f"  %x{t} = getelementptr i8, ptr %x{t - 1}, i64 %apart")
        lines.append(f"  call void @llvm.x86.tileloadd64(i8 {_ROWS + t}, ptr %x{t}, i64 %xs)")
    return lines


def _products(block: Block) -> list[str]:
    """Every tile of the panel by those of X that it meets."""
    lines, tiles = [], _panel_tiles(block.pieces)
    for j in range(block.n):
        tile = tiles[j % len(tiles)]
        lines.append(f"  %w_{j} = getelementptr i8, ptr %w, i64 {_ROW * j}")
        lines.append(f"  call void @llvm.x86.tileloadd64(i8 {tile}, ptr %w_{j}, i64 %ws)")
        for i in range(block.tiles):
            to = j if block.pieces > 1 else i * block.n + j
            lines.append(f"  call void @llvm.x86.tdpbf16ps(i8 {to}, i8 {_ROWS + i}, i8 {tile})")
    return lines


def _functions(block: Block) -> str:
    zero = [f"  call void @llvm.x86.tilezero(i8 {t})" for t in range(block.m * block.n)]
    step = [*_loads_of_rows(block), *_products(block)]
    newline = "\n"
    return f"""
define i32 @dsv4c_amx_begin_{block.name}(ptr %c, i64 %cs, i32 %more) {{
  %again = icmp ne i32 %more, 0
  br i1 %again, label %load, label %zero
load:
{_each_sum(block, "tileloadd64")}
  br label %done
zero:
{newline.join(zero)}
  br label %done
done:
  ret i32 0
}}

define i32 @dsv4c_amx_end_{block.name}(ptr %c, i64 %cs) {{
{_each_sum(block, "tilestored64")}
  ret i32 0
}}

define i32 @dsv4c_amx_steps_{block.name}(
  ptr %x_first, i64 %apart, i64 %xs, ptr %w_first, i64 %ws, i64 %steps,
  ptr %soon, i64 %lines, i64 %turn, i64 %jump
) {{
  %on = shl i64 %ws, 4
  %bytes = shl i64 %lines, 6
  %asks = icmp sgt i64 %bytes, 0
  br label %body
body:
  %s = phi i64 [ %steps, %0 ], [ %left, %rest ]
  %x = phi ptr [ %x_first, %0 ], [ %x_next, %rest ]
  %w = phi ptr [ %w_first, %0 ], [ %w_next, %rest ]
  %f = phi ptr [ %soon, %0 ], [ %f_next, %rest ]
  %turns = icmp eq i64 %s, %turn
  %offset = select i1 %turns, i64 %jump, i64 0
  %from = getelementptr i8, ptr %f, i64 %offset
  br i1 %asks, label %ask, label %rest
ask:
  %at = phi i64 [ 0, %body ], [ %next, %ask ]
  %p = getelementptr i8, ptr %from, i64 %at
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 2, i32 1)
  %next = add i64 %at, {LINE}
  %more = icmp slt i64 %next, %bytes
  br i1 %more, label %ask, label %rest
rest:
{newline.join(step)}
  %x_next = getelementptr i8, ptr %x, i64 {_ROW}
  %w_next = getelementptr i8, ptr %w, i64 %on
  %f_next = getelementptr i8, ptr %from, i64 %bytes
  %left = add i64 %s, -1
  %go = icmp ne i64 %left, 0
  br i1 %go, label %body, label %done
done:
  ret i32 0
}}
"""


@cache
def library(blocks: frozenset[Block]) -> str:
    """What products by these blocks, all of equal `pieces`, call. Addresses and strides are in bytes.

    config_N(rows) for N pieces; release(); begin(sums, stride, more): zeros, or the sums so far where `more`;
    end(sums, stride): write them. steps(x, apart, x stride, panel, panel stride, steps, soon, lines, turn,
    jump): add the products of `steps` >= 1 tiles; tiles of X lie `apart` from one another. Each step requests
    `lines` lines of memory, one after the other from `soon` on, with a jump when `turn` steps are left.
    """
    (pieces,) = {block.pieces for block in blocks}
    return _config(pieces) + "".join(_functions(block) for block in sorted(blocks, key=lambda b: b.name))
