"""What every op accepts: one valid use of each, and every way to get its operands or attributes wrong."""

from __future__ import annotations

from typing import Any

import pytest

from dsv4c.errors import IRError
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Builder, Module, Op
from dsv4c.ir.levels import FUSED_ONLY, Level, allows
from dsv4c.ir.meaning.evaluator import meaning_of
from dsv4c.ir.ops import OPS
from dsv4c.ir.types import TensorType, parse_type

Use = tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]]

HC = ("f32[B, T, 2, 6]", "f32[8, 12]", "f32[8]", "f32[3]")
INDEX = ("f32[B, T, 3, 16]", "f32[B, T, 3]", "f32[B, ctx//4, 16]", "i32[B]", "i32[B]")
ATTENTION = ("f32[B, T, 3, 16]", "f32[B, T, 16]", "f32[B, 8, 16]", "f32[3]", "i32[B]", "i32[B]",
             "f32[B, ctx//4, 16]", "i32[B, T, 5]")  # fmt: skip
EPS = {"eps": 1e-6}
NGRAM = {"pad": 2, "multipliers": (3, 5, 7), "primes": (5, 7, 3, 11), "offsets": (0, 5, 12, 15), "heads": 2,
         "dead": True}  # fmt: skip
HC_EPS = {"eps": 1e-6, "norm_eps": 1e-6}
BORDER = {**HC_EPS, "iters": 20, "out_eps": 1e-6}
PRE = ("f32[B, T, 6]", "f32[B, T, 2]", "f32[B, T, 2, 2]", "f32[B, T, 2]")
POST = ("f32[B, T, 6]", "f32[B, T, 2]", "f32[B, T, 2, 2]")

STORE = {"store": "t", "tier": "disk", "cache_bytes": 9000, "record": 80, "page": 4096}
VALID: dict[str, Use] = {
    "embed": (("i32[B, T]", "bf16[61, 6]"), {}, ("f32[B, T, 6]",)),
    "repeat_streams": (("f32[B, T, 6]",), {"n": 4}, ("f32[B, T, 4, 6]",)),
    "linear": (("f32[B, T, 6]", "bf16[5, 6]"), {}, ("f32[B, T, 5]",)),
    "grouped_linear": (("f32[B, T, 4, 6]", "f32[10, 12]"), {"groups": 2}, ("f32[B, T, 10]",)),
    "rms_norm": (("f32[B, T, 6]", "f32[6]"), EPS, ("f32[B, T, 6]",)),
    "unit_norm": (("f32[B, T, 6]",), EPS, ("f32[B, T, 6]",)),
    "split_heads": (("f32[B, T, 6]",), {"heads": 3}, ("f32[B, T, 3, 2]",)),
    "merge_heads": (("f32[B, T, 3, 2]",), {}, ("f32[B, T, 6]",)),
    "add": (("f32[B, T, 6]", "f32[B, T, 6]"), {}, ("f32[B, T, 6]",)),
    "scale": (("f32[B, T, 6]",), {"factor": 2.0}, ("f32[B, T, 6]",)),
    "clamp": (("f32[B, T, 6]",), {"low": -1.0, "high": 1.0}, ("f32[B, T, 6]",)),
    "swiglu": (("f32[B, T, 6]", "f32[B, T, 6]"), {}, ("f32[B, T, 6]",)),
    "clamped_swiglu": (("f32[B, T, 6]", "f32[B, T, 6]"), {"limit": 10.0}, ("f32[B, T, 6]",)),
    "gather_rows": (("f32[B, T, 6]", "i32[B, L]"), {}, ("f32[B, L, 6]",)),
    "positions": (("i32[B, T]", "i32[B]"), {}, ("i32[B, T]",)),
    "entry_positions": (("i32[B, T]", "i32[B]"), {"ratio": 4}, ("i32[B, (T+3)//4]",)),
    "advance": (("i32[B]", "i32[B]"), {}, ("i32[B]",)),
    "ring_write": (("f32[B, 8, 6]", "f32[B, T, 6]", "i32[B]", "i32[B]"), {}, ("f32[B, 8, 6]",)),
    "entries_append": (("f32[B, ctx//4, 6]", "f32[B, (T+3)//4, 6]", "i32[B]", "i32[B]"), {"ratio": 4},
                       ("f32[B, ctx//4, 6]",)),
    "rope_angles": (("i32[B, T]", "f32[2]"), {}, ("f32[B, T, 2]", "f32[B, T, 2]")),
    "rotary": (("f32[B, T, 3, 6]", "f32[B, T, 2]", "f32[B, T, 2]"), {"inverse": True}, ("f32[B, T, 3, 6]",)),
    "position_bias": (("f32[B, T, 6]", "f32[4, 6]", "i32[B]"), {}, ("f32[B, T, 6]",)),
    "compress": (("f32[B, T, 6]", "f32[B, T, 6]", "f32[B, 8, 6]", "f32[B, 8, 6]", "i32[B]", "i32[B]"),
                 {"ratio": 4, "overlap": True}, ("f32[B, (T+3)//4, 3]",)),
    "index_scores": (INDEX, {"ratio": 4}, ("f32[B, T, ctx//4]",)),
    "index_topk": (("f32[B, T, ctx//4]",), {"k": 5}, ("i32[B, T, 5]",)),
    "index_select": ((*INDEX, "i32[B, T, 7]"), {"ratio": 4, "k": 5, "size": 8}, ("i32[B, T, 5]",)),
    "candidate_blocks": (("f32[B, T, ctx//4]", "i32[B]", "i32[B]"), {"ratio": 4, "size": 8, "count": 7},
                         ("i32[B, T, 7]",)),
    "index_restrict": (("f32[B, T, ctx//4]", "i32[B, T, 7]"), {"size": 8}, ("f32[B, T, ctx//4]",)),
    "index_candidates": (INDEX, {"ratio": 4, "k": 5, "size": 8, "count": 7},
                         ("i32[B, T, 5]", "i32[B, T, 7]")),
    "attention": ((*ATTENTION, "i32[B]"), {"scale": 0.25, "window": 8, "ratio": 4}, ("f32[B, T, 3, 16]",)),
    "hc_mix": (HC, {**HC_EPS, "iters": 20}, ("f32[B, T, 2]", "f32[B, T, 2]", "f32[B, T, 2, 2]")),
    "hc_collapse": (("f32[B, T, 2, 6]", "f32[B, T, 2]"), {}, ("f32[B, T, 6]",)),
    "hc_expand": (("f32[B, T, 2, 6]", "f32[B, T, 6]", "f32[B, T, 2]", "f32[B, T, 2, 2]"), {},
                  ("f32[B, T, 2, 6]",)),
    "hc_head_mix": (("f32[B, T, 2, 6]", "f32[2, 12]", "f32[2]", "f32[1]"), HC_EPS, ("f32[B, T, 2]",)),
    "sqrt_softplus": (("f32[B, T, 6]",), {}, ("f32[B, T, 6]",)),
    "route_topk": (("f32[B, T, 6]", "f32[6]", "i32[B, T]", "f32[6]"), {"k": 2, "image_token": 60},
                   ("i32[B, T, 2]",)),
    "route_hash": (("i32[B, T]", "i32[61, 2]"), {}, ("i32[B, T, 2]",)),
    "route_weights": (("f32[B, T, 6]", "i32[B, T, 2]"), {"factor": 1.5, "eps": 1e-20}, ("f32[B, T, 2]",)),
    "dispatch": (("f32[B, T, 6]", "i32[B, T, 2]", "f32[B, T, 2]", "i32[B]"), {"experts": 2, "label": "R"},
                 ("f32[R.0, 6]", "f32[R.0]", "f32[R.1, 6]", "f32[R.1]")),
    "round_values": (("f32[B, T, 6]",), {"rule": "e4m3", "block": 4, "channels": 5}, ("f32[B, T, 6]",)),
    "hadamard": (("f32[B, T, 3, 8]",), {}, ("f32[B, T, 3, 8]",)),
    "scale_rows": (("f32[R.0, 6]", "f32[R.0]"), {}, ("f32[R.0, 6]",)),
    "combine": (("i32[B, T, 2]", "i32[B]", "f32[R.0, 6]", "f32[R.1, 6]"), {}, ("f32[B, T, 6]",)),
    "expert_mlp": (("f32[B, T, 6]", "i32[B, T, 2]", "f32[B, T, 2]", "i32[B]", "bf16[4, 10, 6]",
                    "bf16[4, 6, 5]"),
                   {"limit": 10.0}, ("f32[B, T, 6]",)),
    "split_columns": (("f32[B, T, 6]",), {"widths": (1, 5)}, ("f32[B, T, 1]", "f32[B, T, 5]")),
    "norm_rotary": (("f32[B, T, 3, 6]", "f32[B, T, 2]", "f32[B, T, 2]", "f32[6]"), EPS, ("f32[B, T, 3, 6]",)),
    "entries_close": (("f32[B, ctx//4, 3]", "f32[B, T, 6]", "f32[B, T, 6]", "f32[B, 8, 6]", "f32[B, 8, 6]",
                       "f32[3]", "f32[B, (T+3)//4, 1]", "f32[B, (T+3)//4, 1]", "i32[B]", "i32[B]"),
                      {"ratio": 4, "overlap": True, **EPS}, ("f32[B, ctx//4, 3]",)),
    "hc_pre": ((*HC, "f32[6]", "f32[B, T, 2]"), BORDER, PRE),
    "hc_post_pre": ((HC[0], *POST, *HC[1:], "f32[6]", "f32[B, T, 2]"), BORDER, ("f32[B, T, 2, 6]", *PRE)),
    "add_route": (("i32[B, T, 2]", "f32[B, T, 2]"), {"expert": 4}, ("i32[B, T, 3]", "f32[B, T, 3]")),
    "expert_statistics": (("f32[4, 3]", "f32[B, T, 6]", "i32[B, T, 2]", "f32[B, T, 2]", "i32[B]",
                           "bf16[4, 10, 6]", "bf16[4, 6, 5]"), {"limit": 10.0}, ("f32[4, 3]",)),
    "input_statistics": (("f32[6]", "f32[B, T, 6]", "i32[B]"), {}, ("f32[6]",)),
    "add_bias": (("f32[B, T, 6]", "f32[6]"), {}, ("f32[B, T, 6]",)),
    "compress_tokens": (("i32[B, T]", "i32[61]"), {"dead": True, "dead_token": 7}, ("i32[B, T]",)),
    "ngram_rows": (("i32[B, T]", "i32[B, 3]", "i32[B]", "i32[B]"), NGRAM, ("i32[B, T, 4]",)),
    "ngram_history": (("i32[B, 3]", "i32[B, T]", "i32[B]", "i32[B]"), {}, ("i32[B, 3]",)),
    "engram_prefetch": (("i32[B, T, 4]",), {"store": "t"}, ("i32[B, T, 4]",)),
    "engram_fetch": (
        ("i32[B, T, 4]", "f8e4m3[26, 64]", "i32[3]", "f8e8m0[26, 2]"), STORE, ("f32[B, T, 256]",),
    ),
    "engram_rows": (("i32[B, T, 4]", "f8e4m3[26, 64]", "f8e8m0[26, 2]"), {}, ("f32[B, T, 256]",)),
    "engram_gate": (("f32[B, T, 2, 6]", "f32[B, T, 18]", "f32[2, 6]", "f32[2, 6]", "i32[B, T]"),
                    {"eps": 1e-20, "copysign": True, "residual": True, "floor": 1e-6}, ("f32[B, T, 2, 6]",)),
    "stream_norm": (("f32[B, T, 2, 6]", "f32[2, 6]"), EPS, ("f32[B, T, 12]",)),
    "short_conv": (("f32[B, T, 12]", "f32[B, 9, 12]", "f32[12, 4]", "i32[B]", "i32[B]"), {"dilation": 3},
                   ("f32[B, T, 12]",)),
    "grid_angles": (("i32[B, N, 2]", "f32[3]"), {}, ("f32[B, N, 6]", "f32[B, N, 6]")),
    "full_attention": (("f32[B, N, 2, 6]",) * 3, {"scale": 0.5}, ("f32[B, N, 2, 6]",)),
    "gelu": (("f32[B, M, 6]",), {}, ("f32[B, M, 6]",)),
    "gather_cells": (("f32[B, N, 6]", "i32[B, M, 4]"), {}, ("f32[B, M, 24]",)),
    "image_span": (("f32[B, M, 6]", "i32[B, S]", "f32[6]", "f32[6]", "f32[6]"), {}, ("f32[B, S, 6]",)),
    "merge_images": (("f32[B, T, 6]", "i32[B, T]", "f32[B, I, 6]", "i32[B]"), {"image_token": 60},
                     ("f32[B, T, 6]",)),
}  # fmt: skip

ANY_RANK = frozenset({
    "unit_norm", "split_columns", "round_values", "scale", "clamp", "sqrt_softplus", "linear", "gelu",
})  # fmt: skip

SHORT: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    *(("attention", ATTENTION[:count], ("f32[B, T, 3, 16]",)) for count in (6, 7, 8)),
    ("norm_rotary", ("f32[B, T, 3, 6]", "f32[B, T, 2]", "f32[B, T, 2]"), ("f32[B, T, 3, 6]",)),
    ("index_select", INDEX, ("i32[B, T, 5]",)), ("route_topk", ("f32[B, T, 6]", "f32[6]"), ("i32[B, T, 2]",)),
    ("hc_pre", (*HC, "f32[6]"), PRE[:3]),
    ("hc_post_pre", (HC[0], *POST, *HC[1:], "f32[6]"), ("f32[B, T, 2, 6]", *PRE[:3])),
]  # fmt: skip
"""Uses without optional operands, and what they give; attributes are those of VALID."""

WRONG_SHAPES = [
    ("split_columns", 0, "f32[B, T, 7]"), ("split_columns", 0, "f32[B, T, C]"),
    ("norm_rotary", 3, "f32[7]"), ("norm_rotary", 1, "f32[B, L, 2]"), ("norm_rotary", 0, "f32[B, T, 3, 3]"),
    ("entries_close", 0, "f32[B, ctx//4, 4]"), ("entries_close", 2, "f32[B, T, 7]"),
    ("entries_close", 3, "f32[B, 4, 6]"), ("entries_close", 5, "f32[6]"),
    ("entries_close", 6, "f32[B, T, 1]"), ("hc_pre", 1, "f32[8, 13]"),
    ("hc_pre", 4, "f32[12]"), ("hc_post_pre", 1, "f32[B, T, 7]"),
    ("hc_post_pre", 3, "f32[B, T, 2, 3]"), ("hc_post_pre", 4, "f32[9, 12]"), ("add_route", 1, "f32[B, T, 3]"),
    ("linear", 1, "f32[5, 7]"), ("grouped_linear", 1, "f32[11, 12]"), ("grouped_linear", 1, "f32[10, 13]"),
    ("grouped_linear", 0, "f32[B, T, H, 6]"), ("rms_norm", 1, "f32[7]"), ("add", 1, "f32[B, T, 7]"),
    ("split_heads", 0, "f32[B, T, 7]"), ("split_heads", 0, "f32[B, T, C]"), ("swiglu", 0, "f32[B, L, 6]"),
    ("ring_write", 1, "f32[B, T, 7]"), ("entries_append", 1, "f32[B, T, 7]"), ("rotary", 1, "f32[B, L, 2]"),
    ("rotary", 2, "f32[B, T, 1]"), ("rotary", 0, "f32[B, T, 3, 3]"), ("rotary", 0, "f32[B, T]"),
    ("position_bias", 1, "f32[4, 7]"), ("compress", 1, "f32[B, T, 7]"), ("compress", 2, "f32[B, 4, 6]"),
    ("compress", 3, "f32[B, 8, 7]"), ("index_scores", 1, "f32[B, T, 4]"),
    ("index_scores", 2, "f32[B, ctx//4, 15]"),
    ("index_select", 1, "f32[B, T, 4]"), ("attention", 1, "f32[B, L, 16]"), ("attention", 2, "f32[B, 8, 15]"),
    ("attention", 3, "f32[4]"), ("attention", 6, "f32[B, ctx//4, 15]"), ("attention", 7, "i32[B, L, 5]"),
    ("attention", 8, "i32[L]"),
    ("hc_mix", 1, "f32[8, 13]"), ("hc_mix", 1, "f32[9, 12]"), ("hc_mix", 0, "f32[B, T, n, 6]"),
    ("hc_collapse", 1, "f32[B, T, 3]"), ("hc_expand", 1, "f32[B, T, 7]"), ("hc_expand", 3, "f32[B, T, 2, 3]"),
    ("hc_head_mix", 1, "f32[3, 12]"), ("route_topk", 1, "f32[7]"), ("route_topk", 0, "f32[B, T, E]"),
    ("round_values", 0, "f32[B, T]"), ("hadamard", 0, "f32[B, T]"), ("hadamard", 0, "f32[B, T, 12]"),
    ("scale_rows", 1, "f32[R.1]"), ("expert_mlp", 4, "bf16[4, 10, 7]"), ("expert_mlp", 5, "bf16[4, 6, 6]"),
    ("expert_mlp", 5, "bf16[3, 6, 5]"), ("expert_statistics", 0, "f32[5, 3]"),
    ("expert_statistics", 0, "f32[4, 2]"), ("expert_statistics", 2, "i32[B, L, 2]"),
    ("expert_statistics", 6, "bf16[4, 6, 6]"), ("input_statistics", 0, "f32[5]"),
    ("input_statistics", 1, "f32[B, 6]"), ("input_statistics", 2, "i32[L]"),
    ("add_bias", 1, "f32[7]"), ("ngram_rows", 1, "i32[B, 1]"), ("ngram_rows", 1, "i32[C, 3]"),
    ("ngram_rows", 1, "i32[B, n]"), ("ngram_history", 1, "i32[C, T]"), ("engram_rows", 2, "f8e8m0[27, 2]"),
    ("engram_prefetch", 0, "i32[B, T]"), ("engram_fetch", 1, "f8e4m3[26, n]"), ("engram_fetch", 2, "i32[27]"),
    ("engram_fetch", 2, "f32[3]"), ("engram_fetch", 3, "f8e8m0[27, 2]"), ("engram_fetch", 3, "f8e8m0[26, 3]"),
    ("engram_fetch", 3, "f32[26, 2]"), ("engram_fetch", 1, "bf16[26, 64]"),
    ("engram_rows", 2, "f8e8m0[26, 3]"), ("engram_rows", 2, "f32[26, 2]"),
    ("engram_rows", 1, "bf16[26, 64]"), ("engram_rows", 0, "i32[B, T, C]"),
    ("engram_gate", 1, "f32[B, T, 12]"),
    ("engram_gate", 2, "f32[2, 7]"), ("engram_gate", 3, "f32[3, 6]"), ("engram_gate", 4, "i32[B, L]"),
    ("stream_norm", 1, "f32[2, 7]"), ("short_conv", 1, "f32[B, 8, 12]"), ("short_conv", 1, "f32[B, 9, 11]"),
    ("short_conv", 2, "f32[11, 4]"), ("short_conv", 2, "f32[12, 5]"),
    ("merge_heads", 0, "f32[B, T, H, 2]"), ("merge_heads", 0, "f32[B, T, 3, D]"),
    ("candidate_blocks", 1, "i32[L]"), ("candidate_blocks", 2, "i32[L]"),
    ("index_restrict", 1, "i32[B, L, 7]"), ("index_restrict", 1, "i32[C, T, 7]"),
    ("index_select", 5, "i32[B, L, 7]"), ("index_select", 5, "i32[C, T, 7]"),
    ("index_candidates", 1, "f32[B, T, 4]"), ("index_candidates", 2, "f32[B, ctx//4, 15]"),
    ("index_candidates", 3, "i32[L]"), ("index_candidates", 4, "i32[L]"),
    ("route_topk", 2, "i32[B, L]"), ("route_topk", 3, "f32[7]"),
    ("hc_pre", 5, "f32[B, T, 3]"), ("hc_post_pre", 8, "f32[B, T, 3]"), ("hc_post_pre", 8, "f32[B, L, 2]"),
    ("grid_angles", 0, "i32[B, N, 3]"), ("grid_angles", 1, "f32[Q]"),
    ("full_attention", 1, "f32[B, M, 2, 6]"), ("full_attention", 2, "f32[B, N, 2, 5]"),
    ("gather_cells", 0, "f32[B, N, D]"), ("gather_cells", 1, "i32[C, M, 4]"),
    ("gather_cells", 1, "i32[B, M, K]"), ("image_span", 1, "i32[C, S]"), ("image_span", 2, "f32[7]"),
    ("image_span", 3, "f32[7]"), ("image_span", 4, "f32[7]"), ("merge_images", 1, "i32[B, L]"),
    ("merge_images", 2, "f32[B, I, 7]"), ("merge_images", 2, "f32[C, I, 6]"), ("merge_images", 3, "i32[L]"),
]  # fmt: skip

WRONG_VALUES = [("split_columns", {"widths": (6, 0)}), ("entries_close", {"ratio": 8}),
                ("entries_close", {"overlap": False}),
                ("round_values", {"rule": "fp8"}), ("round_values", {"channels": 7}),
                ("round_values", {"block": -1}), ("unit_norm", {"rounding": "bf16"}),
                ("attention", {"rounding": "bf16"}), ("index_scores", {"rounding": "yes"}),
                ("index_select", {"rounding": ""}), ("expert_mlp", {"rounding": "reference"}),
                ("route_topk", {"k": 7}), ("grouped_linear", {"groups": 3}), ("split_heads", {"heads": 4}),
                ("compress", {"ratio": 8}), ("compress", {"overlap": False}),
                ("ngram_rows", {"heads": 3}), ("ngram_rows", {"heads": 0}),
                ("ngram_rows", {"offsets": (0, 5)}),
                ("ngram_rows", {"primes": (5, 7, 3, 2**31)}), ("ngram_rows", {"primes": (5, 7, 3, 0)}),
                ("ngram_rows", {"multipliers": (3,)}), ("short_conv", {"dilation": 4}),
                ("engram_fetch", {"record": 64}), ("engram_fetch", {"record": 72}),
                ("engram_fetch", {"page": 80}),
                ("engram_fetch", {"page": 0}), ("engram_fetch", {"tier": "tape"}),
                ("short_conv", {"dilation": 0}),
                ("candidate_blocks", {"size": 0}), ("candidate_blocks", {"count": 0}),
                ("index_restrict", {"size": 0}), ("index_select", {"size": 0}),
                ("index_candidates", {"size": -1}), ("index_candidates", {"count": 0})]  # fmt: skip


def make(name: str, types: tuple[str, ...], attrs: dict[str, Any]) -> Op:
    builder = Builder(Module("m", Level.FUSED))
    builder.loc = "here"
    return builder.multi(name, *(builder.input(f"x{i}", parse_type(t)) for i, t in enumerate(types)), **attrs)


def test_every_op_is_exercised_here() -> None:
    assert {*VALID, "weight"} == set(OPS)


@pytest.mark.parametrize("name", VALID)
def test_a_valid_use_gives_the_declared_results(name: str) -> None:
    types, attrs, results = VALID[name]
    assert tuple(str(v.type) for v in make(name, types, attrs).results) == results


@pytest.mark.parametrize(("name", "index"), [(n, i) for n, use in VALID.items() for i in range(len(use[0]))])
def test_an_operand_of_another_rank_is_refused(name: str, index: int) -> None:
    """Element-wise ops and norms without a weight take any rank."""
    if name in ANY_RANK and index == 0:
        return
    types, attrs, _ = VALID[name]
    odd = [*types[:index], "f32[2, 3, 5, 7, 11]", *types[index + 1 :]]
    with pytest.raises(IRError, match=rf"here: {name} "):
        make(name, tuple(odd), attrs)


@pytest.mark.parametrize(("name", "index", "type_"), WRONG_SHAPES)
def test_a_shape_that_does_not_fit_is_refused(name: str, index: int, type_: str) -> None:
    types, attrs, _ = VALID[name]
    with pytest.raises(IRError, match=rf"here: {name} "):
        make(name, (*types[:index], type_, *types[index + 1 :]), attrs)


@pytest.mark.parametrize(("name", "change"), WRONG_VALUES)
def test_an_attribute_that_does_not_fit_is_refused(name: str, change: dict[str, Any]) -> None:
    types, attrs, _ = VALID[name]
    with pytest.raises(IRError, match=rf"here: {name} "):
        make(name, types, attrs | change)


@pytest.mark.parametrize("name", VALID)
def test_too_few_and_too_many_operands_are_refused(name: str) -> None:
    types, attrs, _ = VALID[name]
    least, most = OPS[name].arity
    for count in {0, least - 1} - {least}:
        with pytest.raises(IRError, match=f"{name} takes {least}"):
            make(name, types[:count], attrs)
    if most is not None:
        with pytest.raises(IRError, match="operands, got"):
            make(name, (*types, "f32[B]"), attrs)


@pytest.mark.parametrize("name", VALID)
def test_attributes_are_checked_by_name_and_kind(name: str) -> None:
    types, attrs, _ = VALID[name]
    with pytest.raises(IRError, match="has no attribute 'colour'"):
        make(name, types, {**attrs, "colour": 1})
    for declared in OPS[name].attrs:
        rest = {k: v for k, v in attrs.items() if k != declared.name}
        wrong = "text" if declared.kind.value != "str" else 3
        with pytest.raises(IRError, match=f"{name}.{declared.name} = .* is mistyped"):
            make(name, types, {**rest, declared.name: wrong})
        if declared.default is None:
            with pytest.raises(IRError, match=f"{name} needs attribute '{declared.name}'"):
                make(name, types, rest)
        else:
            assert make(name, types[: OPS[name].arity[0]], rest).attrs[declared.name] == declared.default


@pytest.mark.parametrize(("name", "types", "results"), SHORT)
def test_optional_operands_may_be_left_out(
    name: str, types: tuple[str, ...], results: tuple[str, ...]
) -> None:
    assert tuple(str(v.type) for v in make(name, types, VALID[name][1]).results) == results


def test_every_optional_operand_is_left_out_above() -> None:
    optional = {n for n, d in OPS.items() if d.arity[1] is not None and d.arity[0] < d.arity[1]}
    elsewhere = {name for name in optional if name.startswith("engram_")}
    assert optional - elsewhere == {name for name, _, _ in SHORT}


def test_the_tokens_of_a_router_come_with_an_image_bias() -> None:
    types, attrs, _ = VALID["route_topk"]
    with pytest.raises(IRError, match="here: route_topk needs an image_bias beside the tokens"):
        make("route_topk", types[:3], attrs)


def test_a_weight_takes_the_type_of_its_expression() -> None:
    builder = Builder(Module("m"))
    value = builder.weight(w.source("a", DType.BF16, (3, 5)), "a.weight")
    assert value.type == TensorType(DType.BF16, (3, 5))
    assert value.producer is not None and value.producer.loc == "a.weight"


# ------------------------------------------------------------------------------------------- tables


def test_every_op_has_a_meaning() -> None:
    assert [name for name in OPS if meaning_of(name) is None] == ["weight"]


def test_op_names_are_those_of_their_declarations() -> None:
    assert all(name == definition.name for name, definition in OPS.items())
    assert all(definition.doc.endswith(".") for definition in OPS.values())


def test_level_tables_name_ops_that_exist() -> None:
    assert set(OPS) >= FUSED_ONLY
    for name in OPS:
        assert allows(Level.FUSED, name)
        assert allows(Level.MODEL, name) == (name not in FUSED_ONLY)
        assert allows(Level.TARGET, name, frozenset({name})) and not allows(Level.TARGET, name, frozenset())


def test_consumed_operands_have_the_type_of_the_result() -> None:
    consuming = {name: d.consumes for name, d in OPS.items() if d.consumes is not None}
    assert consuming == {
        "advance": 0, "ring_write": 0, "entries_append": 0, "expert_statistics": 0, "ngram_history": 0,
        "entries_close": 0, "input_statistics": 0,
    }  # fmt: skip
    for name in consuming:
        types, _, results = VALID[name]
        assert types[0] == results[0]
