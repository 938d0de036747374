"""The CPU target as a value: archs, legal ops, pipelines, formats."""

from __future__ import annotations

import platform

from dsv4c.runtime.cpu import cpu_flags
from dsv4c.targets.base import Arch, Emitter, Format, Target
from dsv4c.targets.onnx.ops import BF16, FUSE, INT8, OPS, VISION

_V2 = ("cx16", "popcnt", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

ARCHS = (
    Arch(
        "x86-64-v4-amx",
        {
            "mcpu": "x86-64-v4",
            "mattr": "+avx512bf16,+avx512vnni,+avx512vbmi,+avx512vbmi2,+amx-tile,+amx-bf16,+amx-int8",
        },
        (*_V4, "avx512_bf16", "avx512_vnni", "avx512vbmi", "avx512_vbmi2",
         "amx_tile", "amx_bf16", "amx_int8"),
    ),
    Arch(
        "x86-64-v4-bf16",
        {"mcpu": "x86-64-v4", "mattr": "+avx512bf16,+avx512vnni,+avx512vbmi,+avx512vbmi2"},
        (*_V4, "avx512_bf16", "avx512_vnni", "avx512vbmi", "avx512_vbmi2"),
    ),
    Arch("x86-64-v4", {"mcpu": "x86-64-v4"}, _V4),
    Arch("x86-64-v3", {"mcpu": "x86-64-v3"}, _V3),
    Arch("x86-64-v2", {"mcpu": "x86-64-v2"}, _V2),
    Arch("aarch64", {"mtriple": "aarch64-linux-gnu", "mcpu": "generic"}, (), "aarch64"),
)
"""The psABI levels, the fourth with dot products and byte look-ups (Zen 4 and later) and with tile registers
(Sapphire Rapids and later), and generic 64-bit ARM. An artifact runs on every machine that has its arch's
features; the best stand first, and of an artifact for several a machine takes the first that it has."""

PORTABLE = ("x86-64-v4-amx", "x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "aarch64")
"""All but x86-64-v2: what lacks AVX2 is older than 2013."""

_ENGRAM = frozenset({"stream_norm", "short_conv", "engram_prefetch", "engram_fetch"})
"""What only the TVM emitter takes so far: a variant's convolution, and tables in a store."""

_ROUNDING = frozenset({"round_values", "hadamard"})
"""Rounding points; ONNX has none of them, so `numerics=reference` is refused there."""

_FUSED = frozenset({
    "split_columns", "norm_rotary", "entries_close", "hc_pre", "hc_post_pre", "add_route",
})  # fmt: skip
"""What the later fusions make; only TVM has kernels for it."""

_UNFUSED = frozenset({"clamp", "index_scores", "index_topk", "candidate_blocks", "index_restrict"})
"""What the first fusions take away, so that a pipeline without them compiles."""

_TVM = (
    ",allow_replay"
    ',layout_engram{stats="", hot_bytes=0, cache_bytes=67108864, tier="disk"}'
    ',fuse_norm_rotary,fuse_rotary_write,fuse_hyper{expand=true},narrow_weights{storage="packed"}'
    ",fold_shared_expert,merge_projections"
)
"""Storage is chosen before weights are joined, so that only what is stored alike is."""
_PLAN = ",plan_memory{tokens=256, batch=1}"


def host_arch() -> str:
    """The highest arch whose features this machine has."""
    machine, flags = platform.machine(), cpu_flags()
    for arch in ARCHS:
        if arch.machine == machine and flags.issuperset(arch.requires):
            return arch.name
    return ARCHS[-1].name if machine == "aarch64" else "x86-64-v2"


def _load_tvm() -> Emitter:
    from .tvm.emit import emit_tvm

    return emit_tvm


def _load_onnx() -> Emitter:
    from dsv4c.targets.onnx.emit import emit_onnx

    return lambda module, store, writer, arch, progress: emit_onnx(module, store, writer, progress)


CPU = Target(
    name="cpu",
    doc="x86-64 and 64-bit ARM processors, by LLVM or ONNX Runtime",
    archs=ARCHS,
    ops=OPS,
    formats=(
        Format(
            "tvm",
            FUSE + _TVM + _PLAN,
            {"tvm": "apache-tvm"},
            _load_tvm,
            frozenset({"expert_statistics", "input_statistics"}).union(
                _ENGRAM, _ROUNDING, _FUSED, _UNFUSED, VISION
            ),
            emits_parts=True,
        ),
        Format(
            "onnx",
            FUSE + ',narrow_weights{storage="f32"}' + _PLAN,
            {"onnx": "onnx"},
            _load_onnx,
            VISION,
            emits_parts=True,
            numerics={"exact": ""},
        ),
    ),
    default_arch=host_arch,
    numerics={
        "exact": "",
        "bf16": BF16,
        "int8": INT8,
        "reference": "apply_reference_rounding",
    },
    sets={"portable": PORTABLE},
)
