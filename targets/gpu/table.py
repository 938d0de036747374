"""The one table of kernels: where each stands, and what its parameters touch.

Knows nothing of Triton: a kernel is named by the file and the function. A line of parameters is `name type
access elements`; several names with a type of SCALARS share a line. Elements are sizes over the constants and
integer arguments of the kernel. In types `W` and `S` stand for pointers to codes and scales as they are
stored, in sizes `PACK` for the values of one code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv4c.errors import CompileError, unknown
from dsv4c.runtime.container.plan import SCALARS, Parameter


@dataclass(frozen=True)
class Source:
    """A function of `kernels/`: `module` is its file, `lines` are its parameters.

    Attributes:
        hot: whether it carries the time of a step, so that spilling registers is an error.
        matrix: whether it must use the matrix units.
    """

    name: str
    module: str
    lines: str
    hot: bool = False
    matrix: bool = False

    def parameters(self, types: Mapping[str, str], pack: int) -> tuple[Parameter, ...]:
        """Its parameters with `types` for W and S; which are divisible the caller knows."""
        out: list[Parameter] = []
        for line in self.lines.strip().splitlines():
            names, _, rest = line.strip().partition(":")
            kind, *more = rest.split()
            for name in names.split():
                if kind in SCALARS:
                    out.append(Parameter(name, kind))
                else:
                    elements = more[1].replace("PACK", str(pack))
                    out.append(Parameter(name, types.get(kind, kind), more[0], elements))
        return tuple(out)


SOURCES = (
    Source("linear", "dense", """
        x: *fp32 r (M-1)*XS+GROUPS*K
        w: W r GROUPS*N*K//PACK
        scale: S r SROWS*SCOLS
        tensor_scale: *fp32 r TENSOR*GROUPS*N//BAND
        y: *fp32 w M*GROUPS*N
        M XS N K SCOLS SROWS BAND: i32""", hot=True, matrix=True),
    Source("row_codes", "rounding", """
        x: *fp32 r (M-1)*XS+D
        codes: *u8 w M*D
        factors: *fp32 w M*COUNT
        M XS: i32""", hot=True),
    Source("round_rows", "rounding", """
        x: *fp32 r (M-1)*XS+HEADS*D
        y: *fp32 w M*HEADS*D
        M XS: i32""", hot=True),
    Source("linear_codes", "codes", """
        x: *u8 r M*K
        factors: *fp32 r M*COUNT
        w: W r N*K//PACK
        scale: S r SROWS*SCOLS
        y: *fp32 w M*N
        M N K COUNT SCOLS SROWS: i32""", hot=True, matrix=True),
    Source("expert_up_codes", "codes", """
        x: *u8 r M*K
        factors: *fp32 r M*COUNT
        weights: *fp32 r R
        order: *i32 r R
        blocks: *i32 r G*3
        w: W r E*2*INNER*K//PACK
        scale: S r E*SROWS*SCOLS
        hidden: *fp32 w R*INNER
        M R G COUNT SCOLS SROWS: i32
        limit: fp32""", hot=True, matrix=True),
    Source("expert_down_codes", "codes", """
        hidden: *u8 r R*INNER
        factors: *fp32 r R*COUNT
        blocks: *i32 r G*3
        w: W r E*N*INNER//PACK
        scale: S r E*SROWS*SCOLS
        y: *fp32 w R*N
        R G COUNT SCOLS SROWS: i32""", hot=True, matrix=True),
    Source("embed", "dense", """
        tokens: *i32 r M
        w: W r V*N//PACK
        scale: S r SROWS*SCOLS
        tensor_scale: *fp32 r TENSOR*V//BAND
        y: *fp32 w M*N
        M V N SCOLS SROWS BAND: i32"""),
    Source("expert_count", "experts", """
        ids: *i32 r R
        n_valid: *i32 r R//TOPK//T
        counts: *i32 w E
        R T: i32"""),
    Source("expert_place", "experts", """
        ids: *i32 r R
        n_valid: *i32 r R//TOPK//T
        counts: *i32 r E
        order: *i32 w R
        slots: *i32 w R
        blocks: *i32 w G*3
        R T G: i32"""),
    Source("expert_up", "experts", """
        x: *fp32 r (M-1)*XS+K
        weights: *fp32 r R
        order: *i32 r R
        blocks: *i32 r G*3
        w: W r E*2*INNER*K//PACK
        scale: S r E*SROWS*SCOLS
        tensor_scale: *fp32 r TENSOR*E*2*INNER//BAND
        hidden: *fp32 w R*INNER
        M XS R G SCOLS SROWS BAND: i32
        limit: fp32""", hot=True, matrix=True),
    Source("expert_down", "experts", """
        hidden: *fp32 r R*INNER
        blocks: *i32 r G*3
        w: W r E*N*INNER//PACK
        scale: S r E*SROWS*SCOLS
        tensor_scale: *fp32 r TENSOR*E*N//BAND
        y: *fp32 w R*N
        R G SCOLS SROWS BAND: i32""", hot=True, matrix=True),
    Source("expert_sum", "experts", """
        y: *fp32 r R*N
        slots: *i32 r M*TOPK
        out: *fp32 w M*N
        M R: i32"""),
    Source("attention", "attention", """
        q: *fp32 r (B*T-1)*QS+H*D
        kv: *fp32 r (B*T-1)*KS+D
        ring: *fp32 r B*RING*D
        sinks: *fp32 r H
        pos n_valid: *i32 r B
        entries: *fp32 r B*C*D
        selected: *i32 r B*T*TOPK
        start: *i32 r START*B
        out: *fp32 w B*T*H*D
        B T QS KS C: i32
        scale: fp32""", hot=True, matrix=True),
    Source("index_scores", "select", """
        q: *fp32 r (B*T-1)*QS+H*D
        weights: *fp32 r (B*T-1)*WS+H
        keys: *fp32 r B*C*D
        pos n_valid: *i32 r B
        blocks: *i32 r B*T*COUNT
        scores: *fp32 w B*T*W
        B T QS WS C W: i32""", hot=True, matrix=True),
    Source("block_tops", "select", """
        scores: *fp32 r B*T*C
        pos n_valid: *i32 r B
        tops: *fp32 w B*T*N
        B T C N: i32""", hot=True),
    Source("index_topk", "select", """
        scores: *fp32 r B*T*W
        pos n_valid: *i32 r B
        blocks: *i32 r B*T*COUNT
        out: *i32 w B*T*TOPK
        B T W: i32""", hot=True),
    Source("compress", "compressor", """
        kv: *fp32 r (B*T-1)*KS+(1+OVERLAP)*WIDTH
        gate: *fp32 r (B*T-1)*GS+(1+OVERLAP)*WIDTH
        kv_ring gate_ring: *fp32 r B*(1+OVERLAP)*RATIO*(1+OVERLAP)*WIDTH
        pos n_valid: *i32 r B
        out: *fp32 w B*G*WIDTH
        B T G KS GS: i32""", hot=True),
    Source("entries_close", "compressor", """
        entries: *fp32 rw B*C*WIDTH
        kv: *fp32 r (B*T-1)*KS+(1+OVERLAP)*WIDTH
        gate: *fp32 r (B*T-1)*GS+(1+OVERLAP)*WIDTH
        kv_ring gate_ring: *fp32 r B*(1+OVERLAP)*RATIO*(1+OVERLAP)*WIDTH
        weight: *fp32 r WIDTH
        cos sin: *fp32 r B*G*HALF
        pos n_valid: *i32 r B
        B T G C KS GS: i32
        eps: fp32""", hot=True),
    Source("hc_project", "hyper", """
        streams: *fp32 r M*WIDTH
        fn: *fp32 r COLUMNS*WIDTH
        parts: *fp32 w SPLITS*M*BN
        M: i32""", hot=True, matrix=True),
    Source("hc_sinkhorn", "hyper", """
        parts: *fp32 r SPLITS*M*BN
        base: *fp32 r N*(2+N)
        scale: *fp32 r 3
        pre post: *fp32 w M*N
        comb: *fp32 w M*N*N
        M: i32
        eps norm_eps: fp32""", hot=True),
    Source("hc_head", "hyper", """
        parts: *fp32 r SPLITS*M*BN
        base: *fp32 r N
        scale: *fp32 r 1
        out: *fp32 w M*N
        M: i32
        eps norm_eps: fp32"""),
    Source("hc_collapse", "hyper", """
        streams: *fp32 r M*N*D
        pre: *fp32 r M*N
        out: *fp32 w M*D
        M: i32""", hot=True),
    Source("hc_expand", "hyper", """
        streams: *fp32 r M*N*D
        y: *fp32 r M*D
        post: *fp32 r M*N
        comb: *fp32 r M*N*N
        out: *fp32 w M*N*D
        M: i32""", hot=True),
    Source("norm", "rowwise", """
        x: *fp32 r (M-1)*XS+HEADS*D
        weight: *fp32 r WEIGHTS*D
        y: *fp32 w M*HEADS*D
        M XS: i32
        eps: fp32""", hot=True),
    Source("norm_rotary", "rowwise", """
        x: *fp32 r (M-1)*XS+HEADS*D
        weight: *fp32 r WEIGHTED*D
        cos sin: *fp32 r M*HALF
        y: *fp32 w M*HEADS*D
        M XS: i32
        eps: fp32""", hot=True),
    Source("rope_angles", "rowwise", """
        positions: *i32 r M
        frequencies: *fp32 r HALF
        cos sin: *fp32 w M*HALF
        M: i32"""),
    Source("unary", "rowwise", """
        x: *fp32 r (M-1)*XS+N
        y: *fp32 w M*N
        M XS: i32
        factor low high: fp32"""),
    Source("binary", "rowwise", """
        x: *fp32 r (M-1)*XS+N
        z: *fp32 r (M-1)*ZS+N
        y: *fp32 w M*N
        M XS ZS: i32
        limit: fp32"""),
    Source("copy_rows", "rowwise", """
        x: *fp32 r (M-1)*XS+N
        y: *fp32 w M*TIMES*N
        M XS: i32"""),
    Source("gather_rows", "rowwise", """
        x: *fp32 r (B*T-1)*XS+N
        rows: *i32 r B*L
        y: *fp32 w B*L*N
        B T L XS: i32"""),
    Source("positions", "state", """
        pos: *i32 r B
        out: *i32 w B*T
        B T: i32"""),
    Source("entry_positions", "state", """
        pos: *i32 r B
        out: *i32 w B*G
        B G: i32"""),
    Source("advance", "state", """
        pos: *i32 rw B
        n_valid: *i32 r B
        B: i32"""),
    Source("ring_write", "state", """
        ring: *fp32 rw B*RING*D
        rows: *fp32 r (B*T-1)*XS+D
        pos n_valid: *i32 r B
        B T XS: i32"""),
    Source("entries_append", "state", """
        entries: *fp32 rw B*C*D
        rows: *fp32 r (B*G-1)*XS+D
        pos n_valid: *i32 r B
        B G C XS: i32"""),
    Source("position_bias", "state", """
        x: *fp32 r (B*T-1)*XS+N
        bias: *fp32 r PERIOD*N
        pos: *i32 r B
        y: *fp32 w B*T*N
        B T XS: i32"""),
    Source("route_topk", "router", """
        scores: *fp32 r (M-1)*XS+E
        bias: *fp32 r E
        tokens: *i32 r IMAGES*M
        image_bias: *fp32 r IMAGES*E
        ids: *i32 w M*TOPK
        M XS image_token: i32"""),
    Source("route_hash", "router", """
        tokens: *i32 r M
        table: *i32 r V*TOPK
        ids: *i32 w M*TOPK
        M V: i32"""),
    Source("route_weights", "router", """
        scores: *fp32 r (M-1)*XS+E
        ids: *i32 r M*TOPK
        weights: *fp32 w M*TOPK
        M XS: i32
        factor eps: fp32"""),
    Source("add_route", "router", """
        ids: *i32 r M*TOPK
        weights: *fp32 r M*TOPK
        more_ids: *i32 w M*(TOPK+1)
        more_weights: *fp32 w M*(TOPK+1)
        M: i32"""),
    Source("compress_tokens", "engram", """
        tokens: *i32 r M
        classes: *i32 r V
        out: *i32 w M
        M V: i32"""),
    Source("ngram_rows", "engram", """
        ids: *i32 r B*T
        history: *i32 r B*HISTORY
        pos n_valid: *i32 r B
        numbers: *i64 r ORDERS+1+2*ORDERS*HEADS
        out: *i32 w B*T*ORDERS*HEADS
        B T: i32"""),
    Source("ngram_history", "engram", """
        history: *i32 rw B*HISTORY
        ids: *i32 r B*T
        pos n_valid: *i32 r B
        B T: i32"""),
    Source("engram_rows", "engram", """
        rows: *i32 r M*COLUMNS
        w: W r V*WIDTH
        scale: S r SROWS*GROUPS
        out: *fp32 w M*COLUMNS*WIDTH
        M V SROWS: i32""", hot=True),
    Source("engram_gate", "engram", """
        x: *fp32 r M*N*D
        kv: *fp32 r (M-1)*KS+(N+1)*D
        q_weight k_weight: *fp32 r N*D
        ids: *i32 r MARKED*M
        out: *fp32 w M*N*D
        M KS: i32
        eps floor: fp32""", hot=True),
    Source("short_conv", "engram", """
        rows: *fp32 r (B*T-1)*XS+N
        ring: *fp32 r B*RING*N
        weight: *fp32 r N*TAPS
        pos n_valid: *i32 r B
        y: *fp32 w B*T*N
        B T XS: i32""", hot=True),
    Source("merge_images", "images", """
        x: *fp32 r (B*T-1)*XS+D
        tokens: *i32 r B*T
        images: *fp32 r B*R*D
        n_images: *i32 r B
        y: *fp32 w B*T*D
        B T R XS image_token: i32"""),
    Source("gather_cells", "images", """
        x: *fp32 r (B*N-1)*XS+D
        cells: *i32 r B*M*CELL
        y: *fp32 w B*M*D*CELL
        B N M XS: i32"""),
    Source("image_span", "images", """
        rows: *fp32 r (B*M-1)*XS+D
        layout: *i32 r B*S
        start newline end: *fp32 r D
        y: *fp32 w B*S*D
        B M S XS: i32"""),
    Source("full_attention", "images", """
        q: *fp32 r (B*N-1)*QS+H*D
        k: *fp32 r (B*N-1)*KS+H*D
        v: *fp32 r (B*N-1)*VS+H*D
        out: *fp32 w B*N*H*D
        B N QS KS VS: i32
        scale: fp32""", hot=True, matrix=True),
)  # fmt: skip
_BY_NAME = {s.name: s for s in SOURCES}


def source(name: str) -> Source:
    """The kernel of that name, or an error that lists them."""
    if name not in _BY_NAME:
        raise unknown("GPU kernel", name, _BY_NAME, CompileError)
    return _BY_NAME[name]
