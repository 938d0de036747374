"""The inner part of every matrix product: some rows of X by one panel of a stored matrix.

Owns the order of summation: columns in steps of `Packing.step`; each step is summed in ascending order, its
scale applied, and added to the row's sum. A few rows decode straight into their sums; more share a step
that is decoded once into a scratch in the first-level cache. Both give the same bits.

Accumulators must be buffers of the default scope below 1 KiB, read at constant places: only those become
registers. Larger ones, and those of scope "local", come from a pool whose memory LLVM cannot tell apart.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from dsv4c.ir.dtypes import DType

from .ahead import ask, asking, load_asking
from .packing import Packing
from .vec import LANES, ramp, splat, zeros

ROWS = 6
"""Rows of a register tile: 6 rows x 4 vectors of accumulators leave room in 32 registers."""
DIRECT = 8
"""Rows up to which numbers go straight from memory into products, where there are 32 wide registers; with 8,
decoding first takes 1.3 to 2 times as long, 1.06 by F32 (AMD Zen 4, weights from memory)."""
TOGETHER = 4
"""Of these, rows that share what is decoded."""
FEW = 2
"""Rows of a last tile that are not worth a whole one."""
CHUNK = 16 * ROWS
"""Rows that share one decoding of a panel."""


def panel_width(rows: int) -> int:
    """Output rows per panel: 64 where there are that many, else the next multiple of 16."""
    return min(64, -(-rows // LANES) * LANES)


def panel_product(p: Packing, k: int, width: int):
    """A function `product(out, X, W, S, R, at, rows, panel, apart, following)` for a kernel's body.

    out f32 [CHUNK * width] gets the rows x width sums; X, W, S (block scales) and R (row scales) are flat;
    row r of X starts at at(r), further pieces of it lie `apart` from one another; 1 <= rows <= CHUNK; panel
    is the index of the panel in W, `following` that of the one that the caller needs next.

    It emits statements with the IR builder: a helper of its own per statement would cost the script parser
    most of a second per kernel.
    """
    vecs, group, step = width // LANES, p.per_word, p.step
    words, per_step, blocks = p.words(k), step // group, p.blocks(k)
    together = vecs if p.wide else 1  # vectors of a register tile
    few, group_of = (DIRECT, TOGETHER) if p.wide else (3 if p.plain else 1, 1)
    in_place = p.code is DType.F32  # nothing to decode, so nothing to share

    def scaled(total, part, S, panel, s, vec):
        """`total` plus the sum `part` of step s, by its scale."""
        if p.scale is None:
            return total + part
        block = (panel * blocks + s * step // p.block) * width + vec * LANES
        return total + part * p.block_scale(S, block)

    def for_each_step(body):
        """`body(step, columns)` for all of k; the last step may be short."""
        if k >= step:
            with T.serial(0, k // step) as s:
                body(s, step)
        if k % step:
            body(k // step, k % step)

    def add_words(parts, X, W, word, places, columns):
        """The first `columns` of the words of 16 rows by rows of X from `places` on, in ascending order."""
        for v in range(vecs):
            totals, lanes = [load(part, v) for part in parts], load_asking(p, W, word, v, width)
            for j in range(columns):
                number = T.bind(p.decode(lanes, j))
                totals = [total + number * splat(X[at + j]) for total, at in zip(totals, places, strict=True)]
            for part, total in zip(parts, totals, strict=True):
                store(part, v, total)

    def direct(out, X, W, S, starts, panel, row):
        """The rows that begin at `starts`, straight from the stored codes."""
        totals, parts = ([sums(vecs) for _ in starts] for _ in range(2))

        def one_step(s, columns):
            word, places = panel * words + s * per_step, [start + s * step for start in starts]
            for part in parts:
                for v in range(vecs):
                    store(part, v, zeros())
            if columns >= group:
                with T.serial(0, columns // group) as g:
                    add_words(parts, X, W, word + g, [at + g * group for at in places], group)
            if rest := columns % group:
                add_words(parts, X, W, word + columns // group, [at + columns - rest for at in places], rest)
            for total, part in zip(totals, parts, strict=True):
                for v in range(vecs):
                    store(total, v, scaled(load(total, v), load(part, v), S, panel, s, v))

        for_each_step(one_step)
        for r, total in enumerate(totals):
            for v in range(vecs):
                store(out, (row + r) * vecs + v, load(total, v))

    def tile(out, X, values, value_at, S, at, rows, first, columns, panel, s, soon):
        """A tile's rows from `first` on by the columns of step s, whose numbers start at values[value_at].

        Beyond the last row that one is repeated. Where numbers are not decoded, lines of the next step, which
        `soon` places, are requested meanwhile, and those rows' next columns.
        """
        starts = [T.bind(at(T.min(first + r, rows - 1)) + s * step) for r in range(ROWS)]
        if soon is not None:
            for start in starts:
                for line in range(step // LANES):
                    ask(X, start + step + line * LANES)
        with T.serial(0, vecs // together) as q:
            parts = [sums(together) for _ in starts]
            with T.serial(0, columns) as c:
                if soon is not None:
                    ask(values, soon + c * width)
                for v in range(together):
                    for r, part in enumerate(parts):
                        number = values[ramp(value_at + c * width + (q * together + v) * LANES)]
                        store(part, v, load(part, v) + number * splat(X[starts[r] + c]))
            for r, part in enumerate(parts):
                for v in range(together):
                    vec = q * together + v
                    place = (first + r) * vecs + vec
                    store(out, place, scaled(load(out, place), load(part, v), S, panel, s, vec))

    def shared(out, X, W, S, at, rows, whole, panel, following):
        """Whole tiles, which share what is decoded."""
        scratch = None if in_place else T.alloc_buffer((step * width,), "float32")
        with T.serial(0, whole * vecs) as i:
            store(out, i, zeros())

        def one_step(s, columns):
            word = panel * words + s * per_step
            if not in_place:
                with T.serial(0, -(-columns // group)) as g:
                    for v in range(vecs):
                        lanes = p.load(W, word + g, v, width)
                        for j in range(group):
                            store(scratch, (g * group + j) * vecs + v, p.decode(lanes, j))
            values, value_at = (W, word * width) if in_place else (scratch, 0)
            given, soon = (out, X, values, value_at, S, at, rows), None
            if in_place:
                soon = following * words
                if not isinstance(s, int):  # which a short step is, the last one
                    soon = T.if_then_else((s + 1) * step < k, word + step, soon)
                soon = T.bind(soon * width)
            with T.serial(0, whole // ROWS) as i:
                line = None if soon is None else soon + i % vecs * LANES
                tile(*given, i * ROWS, columns, panel, s, line)

        for_each_step(one_step)

    def product(out, X, W, S, R, at, rows, panel, _, following):
        with asking():
            whole = whole_tiles(rows, few)
            with T.If(whole > 0), T.Then():
                shared(out, X, W, S, at, rows, whole, panel, following)
            in_groups(whole, rows, at, lambda starts, row: direct(out, X, W, S, starts, panel, row), group_of)
        by_row_scales(p, out, R, rows, panel, width)

    return product


def by_row_scales(p: Packing, out, R, rows, panel, width: int) -> None:
    """Multiply sums by the scales of the matrix's rows, where it has any."""
    vecs = width // LANES
    if p.rows:
        scales = [T.bind(R[ramp(panel * width + v * LANES)]) for v in range(vecs)]
        with T.serial(0, rows) as r:
            for v, scale in enumerate(scales):
                store(out, r * vecs + v, load(out, r * vecs + v) * scale)


def whole_tiles(rows, few: int, height: int = ROWS):
    """Of some rows, those that tiles of `height` take: none of up to `few`, else all but up to `FEW`."""
    rest = T.bind(rows % height)
    whole = T.if_then_else(rest > FEW, rows + (height - rest), rows - rest)
    return T.bind(T.if_then_else(rows > few, whole, T.int64(0)))


def in_groups(first, rows, at, body, together: int = TOGETHER) -> None:
    """`body(starts, row)` for the rows from `first` on, in groups of `together`, two and one.

    Row r starts at at(r).
    """

    def group(row, height):
        body([T.bind(at(row + r)) for r in range(height)], row)

    left = T.bind(T.max(rows - first, 0))
    with T.serial(0, left // together) as i:
        group(T.bind(first + i * together), together)
    for height in (n for n in (2, 1) if n < together):
        with T.If(left % (2 * height) >= height), T.Then():
            group(T.bind(first + left // (2 * height) * (2 * height)), height)


def parts_of(columns: int, size: int, body) -> None:
    """`body(first, how many)` for columns in parts of `size`; the last may be short."""
    if columns >= size:
        with T.serial(0, columns // size) as i:
            body(i * size, size)
    if columns % size:
        body(columns // size * size, columns % size)


def sums(vecs: int):
    """Accumulators: one buffer per row, small enough to become registers."""
    buffer = T.alloc_buffer((vecs * LANES,), "float32")
    for v in range(vecs):
        store(buffer, v, zeros())
    return buffer


def load(buffer, vec):
    return buffer[ramp(vec * LANES)]


def store(buffer, vec, value) -> None:
    T.buffer_store(buffer, value, [ramp(vec * LANES)])
