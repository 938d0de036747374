"""Single operations on FP8, FP4 and FP16 in fixed shapes, through ONNX Runtime, against their meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import B, DictStore, T, normal
from test_model_harness import Arr

from dsv4c.errors import CompileError, TargetError
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.encode import encode
from dsv4c.ir.formats import SCHEMES
from dsv4c.ir.graph import Builder, Module, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.quantised import decode, encode_codes
from dsv4c.ir.types import f32, i32
from dsv4c.ir.weights import WeightExpr
from dsv4c.runtime import Artifact
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.runtime.static_backend import OnnxProgram
from dsv4c.targets import parse_target
from dsv4c.targets.onnx.emit_static import emit_static

PACKED = ("fp8", "fp8_f32", "mxfp8", "mxfp4")


class Small:
    """A module of one op at level TARGET with random weights, and its artifact."""

    def __init__(self, tmp_path: Path, target: str) -> None:
        self.module, self.store = Module("m", Level.TARGET), DictStore()
        self.b, self.rng, self.path = Builder(self.module), np.random.default_rng(11), tmp_path / "m.dsv4"
        self.b.loc = "layers.0.attn"
        family, arch = parse_target(target)
        dialect = family.dialect_of(arch)
        assert dialect is not None
        self.dialect = dialect

    def matrix(self, name: str, scheme: str, rows: int, cols: int) -> WeightExpr:
        """Random numbers, some rows much larger than others."""
        large = np.exp2(self.rng.integers(-6, 3, (rows, 1))) / np.sqrt(cols)
        x, s = (normal(self.rng, rows, cols) * large).astype(np.float32), SCHEMES[scheme]
        made = encode(x, s)
        codes = self.store.add(name, s.code, made.codes)
        if s.scale is None:
            return codes
        return decode(codes, self.store.add(f"{name}.s", s.scale, made.scales), scheme=s)

    def run(self, tokens: int, **inputs: Arr) -> tuple[Arr, Arr]:
        """(by the artifact, by the meaning) of output y."""
        self.module.meta["static_shapes"] = {"batch": 1, "context": 64, "tokens": [tokens], "stages": 1}
        with ArtifactWriter(self.path) as writer:
            emit_static(self.module, self.store, writer, self.dialect)
        program = OnnxProgram(Artifact.open(self.path), 1, f"onnx.{tokens}", [])
        (got,) = program.run(["y"], inputs)
        return got, Evaluator(self.module, self.store)(inputs, {}).outputs["y"]


def close(got: Arr, want: Arr, tolerance: float) -> None:
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
    assert got.shape == want.shape and np.abs(want).max() > 0


@pytest.mark.parametrize(("n", "k"), [(256, 128), (200, 160), (40, 64), (136, 256)])
@pytest.mark.parametrize("scheme", PACKED)
def test_linear_maps_of_codes(tmp_path: Path, scheme: str, n: int, k: int) -> None:
    """Sizes of whole tiles, of cut ones, and smaller than one."""
    c = Small(tmp_path, "ascend:950")
    weight = c.b.weight(c.matrix("w", scheme, n, k), "w")
    c.module.outputs["y"] = c.b.op("linear", c.b.input("x", f32(B, T, k)), weight)
    close(*c.run(3, x=normal(c.rng, 1, 3, k)), 1e-6)


def experts(c: Small, kind: str, rounding: str, count: int, inner: int, width: int) -> None:
    def stacked(name: str, rows: int, cols: int) -> Value:
        parts = tuple(c.matrix(f"{name}{e}", kind, rows, cols) for e in range(count))
        return c.b.weight(w.stack(parts), f"layers.0.ffn.experts.{name}")

    x = c.b.input("x", f32(B, T, width))
    operands = [
        c.b.op("round_values", x, rule=rounding) if rounding in ("fp16", "bf16") else x,
        c.b.input("ids", i32(B, T, 2)), c.b.input("g", f32(B, T, 2)), c.b.input("n_valid", i32(B)),
        stacked("w13", 2 * inner, width), stacked("w2", width, inner),
    ]  # fmt: skip
    c.module.outputs["y"] = c.b.op("expert_mlp", *operands, limit=10.0, rounding=rounding)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(
    ("target", "kind", "rounding", "tolerance"),
    [
        *(("ascend:950", kind, rounding, 1e-5) for kind in PACKED for rounding in ("none", "mxfp8")),
        ("ascend:910c", "int8", "none", 1e-5),
        ("mlu:590", "fp16", "fp16", 2e-3),
        ("ascend:950", "fp16", "fp16", 2e-3),
        ("mlu:590", "fp16", "none", 1e-5),
        ("ascend:950", "f32", "mxfp8", 1e-5),
        *(("cuda:sm_90a", kind, "bf16", 2e-2) for kind in ("fp8", "mxfp8", "mxfp4")),
    ],
)
def test_experts(
    tmp_path: Path, target: str, kind: str, rounding: str, tolerance: float, tokens: int
) -> None:
    """One token gathers its experts' matrices, nine multiply all; some tokens choose no common expert."""
    c = Small(tmp_path, target)
    experts(c, kind, rounding, 8, 96, 160)
    ids = np.stack([c.rng.permutation(8)[:2] for _ in range(tokens)])[None].astype(np.int32)
    g = c.rng.uniform(0.2, 1, (1, tokens, 2)).astype(np.float32)
    x = normal(c.rng, 1, tokens, 160)
    got, want = c.run(tokens, x=x, ids=ids, g=g, n_valid=np.array([tokens], np.int32))
    close(got, want, tolerance)
    assert (np.abs(got - want) <= 1e-6 * np.abs(want).max()).mean() > 0.95  # it rounds where the meaning does


@pytest.mark.parametrize("name", ["linear", "grouped_linear"])
def test_fp16_products_round_their_results(tmp_path: Path, name: str) -> None:
    c = Small(tmp_path, "mlu:590")
    x = c.b.input("x", f32(B, T, 2, 96))
    weight, attrs = c.b.weight(c.matrix("w", "fp16", 64, 96), "w"), {"groups": 2} if name[0] == "g" else {}
    y = c.b.op(name, c.b.op("round_values", x, rule="fp16"), weight, **attrs)
    c.module.outputs["y"] = c.b.op("round_values", y, rule="fp16")
    got, want = c.run(7, x=normal(c.rng, 1, 7, 2, 96))
    assert np.array_equal(got, got.astype(np.float16)) and (got == want).mean() > 0.95
    close(got, want, 1e-3)


@pytest.mark.parametrize(("target", "kind", "message"), [
    ("cuda:sm_90a", "fp8_f32", r'layers.0.attn: expert_mlp with rounding = "bf16" over other numbers'),
    ("ascend:950", "mxfp4", r"has no expert_mlp with rounding = 'bf16'; allowed: none, fp16, mxfp8"),
])  # fmt: skip
def test_bf16_experts_need_exact_weights_and_a_product(
    tmp_path: Path, target: str, kind: str, message: str
) -> None:
    c = Small(tmp_path, target)
    experts(c, kind, "bf16", 4, 32, 128)
    with pytest.raises(TargetError, match=message):
        c.run(1, x=normal(c.rng, 1, 1, 128))


def test_fp16_experts_need_fp16_weights(tmp_path: Path) -> None:
    c = Small(tmp_path, "mlu:590")
    experts(c, "f32", "fp16", 4, 32, 32)
    with pytest.raises(TargetError, match=r'layers.0.attn: expert_mlp with rounding = "fp16" over other'):
        c.run(1, x=normal(c.rng, 1, 1, 32))


def rounded(tmp_path: Path, target: str, x: Arr, **attrs: object) -> tuple[Arr, Arr]:
    c = Small(tmp_path, target)
    c.module.outputs["y"] = c.b.op("round_values", c.b.input("x", f32(B, T, x.shape[-1])), **attrs)
    return c.run(x.shape[1], x=x)


@pytest.mark.parametrize("width", [128, 80, 20])
def test_e4m3_is_rounded_bit_for_bit(tmp_path: Path, width: int) -> None:
    """Over 40 powers of two, at powers of two and beside them, with zeros, and a last shorter block."""
    rng = np.random.default_rng(5)
    x = normal(rng, 1, 400, width) * np.exp2(rng.integers(-20, 20, (1, 400, 1))).astype(np.float32)
    x[0, 0], x[0, 1, :5] = 0, [448, -448, 447, 1e-9, -0.0]
    x[0, 2:42, 0] = np.exp2(np.arange(-20, 20)) * 448
    x[0, 42:82] = np.nextafter(x[0, 2:42], np.float32(np.inf))
    got, want = rounded(tmp_path, "ascend:950", x.astype(np.float32), rule="e4m3", block=32)
    assert np.array_equal(got, want) and np.isfinite(got).all()
    assert not np.array_equal(got, x)


def test_fp16_is_rounded_bit_for_bit(tmp_path: Path) -> None:
    values = [
        65504,
        65519,
        65520,
        -1e6,
        2.0**-14,
        2.0**-25,
        2.0**-25 * 1.01,
        1 + 2.0**-11,
        1 + 3 * 2.0**-11,
        0,
    ]
    got, want = rounded(tmp_path, "mlu:590", np.array([[values]], np.float32), rule="fp16")
    assert np.array_equal(got, want)
    assert got[0, 0, :4].tolist() == [65504, 65504, np.inf, -np.inf] and got[0, 0, 5:7].tolist() == [
        0,
        2**-24,
    ]
    assert got[0, 0, 7:9].tolist() == [1, 1 + 2**-9]


def test_no_weight_beyond_fp16(tmp_path: Path) -> None:
    """The error names the tensor, what FP16 holds, and what to do."""
    c = Small(tmp_path, "mlu:590")
    big = np.ones((8, 32), np.float32)
    big[3, 4] = 7e4
    plain = c.store.add("layers.0.attn.wo_b.weight", DType.F32, big)
    weight = encode_codes(plain, scheme="fp16")
    c.module.outputs["y"] = c.b.op("linear", c.b.input("x", f32(B, T, 32)), c.b.weight(weight, "w"))
    with pytest.raises(CompileError) as caught:
        c.run(1, x=normal(c.rng, 1, 1, 32))
    message = str(caught.value)
    assert "layers.0.attn.wo_b.weight" in message and "a magnitude of 70000 is beyond FP16" in message
    assert "allowed: 65504" in message and "hint: keep this class of weights in bf16" in message
