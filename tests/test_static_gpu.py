"""ONNX for GPUs: single nodes against the meaning of their op, whole models against the judge and the tables.

Nothing here needs a card. Where the processor has a kernel for a node, both the kernel and the body that the
file carries are held to the meaning.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from support import B, T, normal
from test_model_harness import BETWEEN_CHUNKINGS, TOLERANCE, Arr, Models, feed, stored, within
from test_static_artifact import built, divergence, models_of, models_text
from test_static_operations import Small, close

import dsv4c
from dsv4c.cli import main
from dsv4c.errors import TargetError, ToolchainError
from dsv4c.ir.packed import packed_form
from dsv4c.ir.types import f32
from dsv4c.ir.weights import stream
from dsv4c.runtime import Artifact, Session
from dsv4c.runtime.onnx_backend import Provider
from dsv4c.runtime.static_backend import OnnxProgram, provider_opener
from dsv4c.runtime.unpack import unpack
from dsv4c.runtime.verify import failures, verify
from dsv4c.targets import TARGETS, parse_target

ROOT = Path(__file__).resolve().parents[1]
BOTH = ("cuda:sm_90a", "rocm:gfx942")
EVERY = [f"{name}:{arch.name}" for name in ("cuda", "rocm") for arch in TARGETS[name].archs]
KERNEL: Provider = ("CPUExecutionProvider", {})
"""Named, it executes a file as it is shipped: kernels, not bodies."""


# ------------------------------------------------------------------------------------- single nodes


def three_ways(c: Small, tokens: int, **inputs: Arr) -> tuple[Arr, Arr, Arr]:
    """(by the bodies, by the kernels of the processor, by the meaning) of output y."""
    by_body, meant = c.run(tokens, **inputs)
    shipped = OnnxProgram(Artifact.open(c.path), 1, f"onnx.{tokens}", [], KERNEL)
    return by_body, shipped.run(["y"], inputs)[0], meant


def nodes_of(c: Small) -> Counter[str]:
    (model,) = models_of(c.path).values()
    return Counter(f"{n.domain}::{n.op_type}" for n in model.graph.node)


@pytest.mark.parametrize(("n", "d", "tokens"), [(4, 64, 5), (2, 33, 1), (1, 7, 3)])
def test_streams_are_collapsed_and_expanded_by_one_node(tmp_path: Path, n: int, d: int, tokens: int) -> None:
    """Weights that are no symmetric matrix: a transposed one would show."""
    c = Small(tmp_path, "cuda:sm_90a")
    x, pre = c.b.input("x", f32(B, T, n, d)), c.b.input("pre", f32(B, T, n))
    post, comb = c.b.input("post", f32(B, T, n)), c.b.input("comb", f32(B, T, n, n))
    c.module.outputs["y"] = c.b.op("hc_expand", x, c.b.op("hc_collapse", x, pre), post, comb)
    shapes = {"x": (n, d), "pre": (n,), "post": (n,), "comb": (n, n)}
    found = three_ways(c, tokens, **{k: normal(c.rng, 1, tokens, *s) for k, s in shapes.items()})
    for got in found[:2]:
        close(got, found[2], 1e-6)
    kinds = nodes_of(c)
    for name in ("HyperConnectionPreMix", "HyperConnectionPostMix"):
        assert kinds[f"com.microsoft::{name}"] == 1
    assert kinds["::MatMul"] == 0


@pytest.mark.parametrize("eps", [1e-6, 1e-20])
def test_norms_are_one_node(tmp_path: Path, eps: float) -> None:
    c = Small(tmp_path, "cuda:sm_90a")
    weight = c.b.weight(c.store.add("w", f32(48).dtype, normal(c.rng, 48)), "w")
    y = c.b.op("unit_norm", c.b.op("rms_norm", c.b.input("x", f32(B, T, 3, 48)), weight, eps=eps), eps=eps)
    c.module.outputs["y"] = y
    x = normal(c.rng, 1, 4, 3, 48) * np.exp2(c.rng.integers(-12, 12, (1, 4, 3, 1))).astype(np.float32)
    close(*c.run(4, x=x), 1e-6)
    assert nodes_of(c)["::RMSNormalization"] == 2


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotary_is_one_node_over_the_last_channels(tmp_path: Path, heads: int, inverse: bool) -> None:
    c = Small(tmp_path, "cuda:sm_90a")
    shape = (heads, 40) if heads else (40,)
    x = c.b.input("x", f32(B, T, *shape))
    angles = (c.b.input("cos", f32(B, T, 8)), c.b.input("sin", f32(B, T, 8)))
    c.module.outputs["y"] = c.b.op("rotary", x, *angles, inverse=inverse)
    angle = c.rng.uniform(-30, 30, (1, 6, 8)).astype(np.float32)
    close(*c.run(6, x=normal(c.rng, 1, 6, *shape), cos=np.cos(angle), sin=np.sin(angle)), 1e-6)
    assert nodes_of(c)["::RotaryEmbedding"] == 1


def product(c: Small, scheme: str, n: int, k: int) -> None:
    """round, linear, round: what numerics of BF16 make of a matrix of codes."""
    x = c.b.op("round_values", c.b.input("x", f32(B, T, k)), rule="bf16")
    y = c.b.op("linear", x, c.b.weight(c.matrix("w", scheme, n, k), "w"))
    c.module.outputs["y"] = c.b.op("round_values", y, rule="bf16")


@pytest.mark.parametrize(("scheme", "n", "k", "blocks"), [
    ("fp8", 256, 256, True), ("fp8", 200, 384, True), ("fp8", 40, 128, True), ("mxfp8", 72, 160, True),
    ("fp8", 128, 200, False),  # a cut block
    ("fp8_f32", 128, 256, False),  # scales that are no powers of two: decoded to BF16 they would round
    ("mxfp4", 128, 256, False),
])  # fmt: skip
def test_products_of_fp8_codes(tmp_path: Path, scheme: str, n: int, k: int, blocks: bool) -> None:
    """By the node where that is exact, else by decoded numbers; rounded to BF16 either way.

    Sums of other orders may round to the BF16 number beside: one step is 2^-8 of a value.
    """
    c = Small(tmp_path, "cuda:sm_90a")
    product(c, scheme, n, k)
    got, want = c.run(5, x=normal(c.rng, 1, 5, k))
    assert (nodes_of(c)["com.microsoft::MatMulBlockQuantizedFp8Weight"] == 1) is blocks
    close(got, want, 2.0**-8)
    assert (got == want).mean() > 0.98
    assert np.array_equal(got, got.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_kernel_of_bf16_products_turns_the_second_factor() -> None:
    """The processor's takes FLOAT only; that it does what the body says does not hang on the type."""
    import onnxruntime

    x = np.random.default_rng(2).normal(size=(2, 3, 5, 7)).astype(np.float32)
    w = x[:, :, :4] + 1
    node = onnx.helper.make_node("FusedMatMul", ["a", "b"], ["y"], domain="com.microsoft", transB=1)
    infos = [onnx.helper.make_tensor_value_info(n, 1, [None] * 4) for n in "aby"]
    graph = onnx.helper.make_graph([node], "g", infos[:2], infos[2:])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=[KERNEL[0]])
    close(session.run(None, {"a": x, "b": w})[0], x @ w.swapaxes(-1, -2), 1e-6)


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4"])
def test_grouped_products_in_bf16(tmp_path: Path, scheme: str) -> None:
    c = Small(tmp_path, "cuda:sm_90a")
    x = c.b.op("round_values", c.b.input("x", f32(B, T, 2, 128)), rule="bf16")
    y = c.b.op("grouped_linear", x, c.b.weight(c.matrix("w", scheme, 64, 128), "w"), groups=2)
    c.module.outputs["y"] = c.b.op("round_values", y, rule="bf16")
    got, want = c.run(7, x=normal(c.rng, 1, 7, 2, 128))
    assert nodes_of(c)["com.microsoft::FusedMatMul"] == 1
    close(got, want, 2.0**-8)
    assert (got == want).mean() > 0.98


def test_a_product_that_is_not_rounded_is_no_node_of_bf16(tmp_path: Path) -> None:
    c = Small(tmp_path, "cuda:sm_90a")
    weight = c.b.weight(c.matrix("w", "fp8", 64, 128), "w")
    c.module.outputs["y"] = c.b.op("linear", c.b.input("x", f32(B, T, 128)), weight)
    close(*c.run(2, x=normal(c.rng, 1, 2, 128)), 1e-6)
    assert not [kind for kind in nodes_of(c) if kind.startswith("com.")]


def test_the_processor_has_no_kernel_for_the_product(tmp_path: Path) -> None:
    """Which is why the file carries its meaning, and why the runtime reads that under another name."""
    c = Small(tmp_path, "cuda:sm_90a")
    product(c, "fp8", 128, 128)
    c.run(1, x=normal(c.rng, 1, 1, 128))
    with pytest.raises(Exception, match="Could not find an implementation for MatMulBlockQuantizedFp8Weight"):
        OnnxProgram(Artifact.open(c.path), 1, "onnx.1", [], KERNEL)


# ----------------------------------------------------------------------------------- FNUZ by two


@pytest.mark.parametrize(("n", "k"), [(256, 128), (200, 160)])
def test_fnuz_codes_are_the_same_numbers(tmp_path: Path, n: int, k: int) -> None:
    c = Small(tmp_path, "rocm:gfx942")
    weight = c.b.weight(c.matrix("w", "fp8_fnuz", n, k), "w")
    c.module.outputs["y"] = c.b.op("linear", c.b.input("x", f32(B, T, k)), weight)
    close(*c.run(3, x=normal(c.rng, 1, 3, k)), 1e-6)
    (model,) = models_of(c.path).values()
    assert TensorProto.FLOAT8E4M3FNUZ in {t.data_type for t in model.graph.initializer}


def pairs(models: Models, artifact: Artifact) -> Iterator[tuple[Arr, Arr, Arr, Arr]]:
    """(codes, scales) of the checkpoint and of the artifact, for every FP8 matrix that is no expert's."""
    module = models.module("kjv")
    for op in module.weights():
        held = packed_form(op.weight) if op.weight is not None else None
        if held is None or held.scheme.name != "fp8" or op.loc not in artifact.tensors:
            continue
        assert module.store is not None
        codes, scales = (
            np.concatenate([np.asarray(p).view(np.uint8) for p in stream(x, module.store)])
            for x in held.parts
        )
        yield codes, scales, artifact.array(op.loc), artifact.array(f"{op.loc}.scales")


def test_bits_stay_and_scales_are_doubled(models: Models) -> None:
    """E4M3FNUZ reads the bits of E4M3FN as half the number: who forgets is wrong by two, without an error."""
    found = list(pairs(models, Artifact.open(built(models, "kjv", "rocm:gfx942", "fast"))))
    assert len(found) > 40
    for codes, scales, bits, exponents in found:
        codes, bits = codes.reshape(bits.shape), bits.view(np.uint8)
        negative_zero = codes == 0x80
        assert np.array_equal(bits[~negative_zero], codes[~negative_zero]) and not bits[negative_zero].any()
        assert np.array_equal(exponents.view(np.uint8), scales.reshape(exponents.shape) + 1)
        plain = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        fnuz = bits.view(ml_dtypes.float8_e4m3fnuz).astype(np.float32)
        assert np.array_equal(fnuz * 2, plain)


# ------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize(("target", "name"), [
    ("cuda:sm_90a", "v4"), ("rocm:gfx942", "v4_r16"),
    pytest.param("cuda:sm_90a", "v4_r16", marks=pytest.mark.matrix),
    pytest.param("rocm:gfx942", "v4", marks=pytest.mark.matrix),
])  # fmt: skip
def test_exact_logits_however_the_prompt_is_cut(models: Models, target: str, name: str) -> None:
    session = Session(built(models, name, target, "exact"), threads=1)
    want = stored(f"golden/{name}/golden.npz")
    ids = want["input_ids"]
    whole = feed(session, ids, [len(ids)])
    within(whole, want["logits"], TOLERANCE)
    session.reset()
    within(feed(session, ids, [24, 1, 1, len(ids) - 26]), whole, BETWEEN_CHUNKINGS)


@pytest.mark.parametrize("target", BOTH)
def test_v41_verifies_block_by_block(models: Models, target: str) -> None:
    """With n-gram ids and table rows from the host: no node of these files hashes."""
    path = built(models, "v41", target, "exact")
    checks = verify(Artifact.open(path), threads=1)
    assert not failures(checks) and max(c.error for c in checks) < 1e-5
    assert sum(c.name.startswith("block") for c in checks) == 8
    for model in models_of(path).values():
        assert not [n for n in model.graph.node if n.op_type.startswith(("Bitwise", "NGram"))]


@pytest.mark.oracle
def test_a_route_that_all_draws_move_the_same_way_is_known_to_be_open(models: Models) -> None:
    """Token 3 lies so near to another expert in layer 3 that processors part; all draws of FP16 agree."""
    artifact = Artifact.open(built(models, "v4_r16", "cuda:sm_80", "half"))
    assert artifact.meta["golden"]["undecided"]["block.layers.3"]["rows"] == [3]
    assert not failures(verify(artifact, threads=1))


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["v4_r16", "v41"])
@pytest.mark.parametrize("numerics", ["fast", "half", "exact"])
@pytest.mark.parametrize("target", EVERY)
def test_every_card_verifies(models: Models, target: str, numerics: str, name: str) -> None:
    """With `test_every_arch_verifies_block_by_block`, the whole matrix of cards, numerics and models."""
    checks = verify(Artifact.open(built(models, name, target, numerics)), threads=1)
    assert not failures(checks) and any(c.name.startswith("block") for c in checks)
    if numerics == "exact":
        assert max(c.error for c in checks) < 1e-5


@pytest.mark.parametrize("target", BOTH)
def test_fast_numerics_lose_little(models: Models, target: str) -> None:
    """On the trained example's held-out text, against the model as stored."""
    ids = models_text(models, 100)
    want = dsv4c.evaluate(models.module("kjv"), ids)
    session = Session(built(models, "kjv", target, "fast"), threads=1)
    found = feed(session, ids, [len(ids)])
    lost = divergence(want, found)
    print(f"{target}: KL {lost:.2e}, top-1 {(found.argmax(1) == want.argmax(1)).mean():.3f}")
    assert lost < (1e-4 if target.startswith("cuda") else 1e-6)
    assert (found.argmax(1) == want.argmax(1)).mean() > 0.98


def table(target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "targets" / target / "nodes.json").read_text())
    return found


@pytest.mark.parametrize("numerics", ["fast", "half", "exact"])
@pytest.mark.parametrize("target", BOTH)
def test_files_keep_to_the_table(models: Models, target: str, numerics: str) -> None:
    """Nodes at their versions, element types, and functions for every node of another domain."""
    family, arch = parse_target(target)
    dialect = family.dialect_of(arch)
    assert dialect is not None
    for model in models_of(built(models, "v4", target, numerics)).values():
        versions = {o.domain: o.version for o in model.opset_import}
        assert versions[""] == dialect.opset == (23 if family.name == "cuda" else 19)
        for node in model.graph.node:
            known = dialect.nodes[f"{node.domain or 'ai.onnx'}::{node.op_type}"]
            assert any(low <= versions[node.domain] <= high for low, high in known)
        assert {(n.domain, n.op_type) for n in model.graph.node if n.domain} == {
            (f.domain, f.name) for f in model.functions
        }
        for tensor in model.graph.initializer:
            dialect.check_type(tensor.data_type, len(tensor.dims), tensor.name, "file")


_NAMES = {1: "float", 6: "int32", 7: "int64", 10: "float16", 16: "bfloat16", 17: "float8e4m3fn"}


@pytest.mark.parametrize("numerics", ["fast", "half"])
def test_the_provider_has_a_kernel_of_every_type(models: Models, numerics: str) -> None:
    """Of what a node takes first, as far as the table says; the rest would run on the processor, unasked."""
    types = table("cuda")["types"]
    for model in models_of(built(models, "v4", "cuda:sm_90a", numerics)).values():
        inferred = onnx.shape_inference.infer_shapes(model)
        typed = (*inferred.graph.value_info, *inferred.graph.input)
        known = {i.name: i.type.tensor_type.elem_type for i in typed}
        known |= {t.name: t.data_type for t in inferred.graph.initializer}
        for node in inferred.graph.node:
            data = node.input[1] if node.op_type == "Where" else node.input[0]
            element = _NAMES.get(known.get(data, 0), "")
            if element and f"ai.onnx::{node.op_type}" in types and not node.domain:
                assert element in types[f"ai.onnx::{node.op_type}"], (element, node.name)


_CONSTANT = {
    "TopK": [1], "Slice": [1, 2, 3, 4], "Reshape": [1], "Expand": [1], "Split": [1], "Squeeze": [1],
    "Unsqueeze": [1], "ReduceSum": [1], "ReduceMax": [1], "ReduceMean": [1], "ReduceSumSquare": [1],
    "CumSum": [1],
}  # fmt: skip
"""Inputs that MIGraphX wants as constants, see the limits in its table."""


@pytest.mark.parametrize("name", ["v4", "v41"])
def test_migraphx_gets_constant_sizes_and_no_int32_remainder(models: Models, name: str) -> None:
    limits = table("rocm")["limits"]
    assert "dynamic ``k``" in limits["ai.onnx::TopK"] and "int32" in limits["ai.onnx::Mod"]
    for model in models_of(built(models, name, "rocm:gfx942", "exact")).values():
        constants = {t.name: t.data_type for t in model.graph.initializer}
        for node in model.graph.node:
            assert all(
                node.input[i] in constants for i in _CONSTANT.get(node.op_type, ()) if i < len(node.input)
            ), node.name
            if node.op_type == "Mod":
                assert {constants[n] for n in node.input if n in constants} <= {TensorProto.INT64}
            assert {a.name for a in node.attribute}.isdisjoint({"saturate", "allowzero"})


@pytest.mark.parametrize("numerics", ["fast", "half", "exact"])
def test_migraphx_gets_no_float8_but_fnuz(models: Models, numerics: str) -> None:
    found = Counter[int]()
    for model in models_of(built(models, "v4", "rocm:gfx942", numerics)).values():
        found.update(t.data_type for t in model.graph.initializer)
        found.update(a.i for n in model.graph.node for a in n.attribute if n.op_type == "Cast")
    assert not found[TensorProto.FLOAT8E4M3FN] and not found[TensorProto.FLOAT8E5M2]
    assert bool(found[TensorProto.FLOAT8E4M3FNUZ]) is (numerics == "fast")


@pytest.mark.parametrize("target", BOTH)
def test_estimates_count_the_stored_formats(models: Models, target: str) -> None:
    """For one card of the arch; bytes of weights within one percent of the artifact's."""
    artifact = Artifact.open(built(models, "kjv", target, "fast"))
    found = artifact.meta["report"]["estimate"]
    assert found["device"]["name"] == {"cuda:sm_90a": "h200", "rocm:gfx942": "mi300x"}[target]
    (memory,) = found["placement"]["memory"]
    stored = sum(t.nbytes for t in artifact.tensors.values() if not t.name.startswith("golden."))
    assert abs(memory["dense"] + memory["experts"] - stored) < 0.01 * stored
    assert "fp4 weights are multiplied in fp8" in found["assumptions"]


@pytest.mark.parametrize("scheme", ["int4", "nvfp4"])
def test_codes_that_no_file_holds_become_numbers(models: Models, tmp_path: Path, scheme: str) -> None:
    """Asked to keep them packed, the emitter decodes what it has no form for."""
    path = dsv4c.compile(
        models.checkpoint("v4"), output=tmp_path / "m.dsv4", target="cuda", numerics="exact", format="onnx",
        passes=f'requantise{{experts="{scheme}"}},default,with(narrow_weights{{storage="packed"}}),'
        'with(bind_shapes{tokens="1", context=64})',
    )  # fmt: skip
    assert not failures(verify(Artifact.open(path), threads=1))


def test_another_kind_of_float8_is_refused_with_its_layer(models: Models, tmp_path: Path) -> None:
    """Inputs in MXFP8 need E4M3FN, which MIGraphX does not read."""
    passes = 'quantise_activations{rule="mxfp8"},default,with(bind_shapes{tokens="1", context=64})'
    message = r"layers\.0\.attn: rounding to E4M3 is of f8e4m3, which rocm lacks; allowed: .*f8e4m3fnuz"
    with pytest.raises(TargetError, match=message) as caught:
        dsv4c.compile(
            models.checkpoint("v4"), output=tmp_path / "m.dsv4", target="rocm", numerics="exact",
            format="onnx", passes=passes,
        )  # fmt: skip
    assert "dsv4c targets lists numerics" in caught.value.hint
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- on the device


@pytest.mark.parametrize(("target", "provider"), [
    ("cuda:sm_90a", "CUDAExecutionProvider"), ("rocm:gfx942", "MIGraphXExecutionProvider"),
])  # fmt: skip
def test_run_script_asks_for_the_provider(
    models: Models, tmp_path: Path, target: str, provider: str
) -> None:
    """With stand-ins for Python: one whose ONNX Runtime lacks the provider, one that has it."""
    unpack(Artifact.open(built(models, "v4", target, "fast")), tmp_path / "device")
    script = tmp_path / "device" / "run.sh"
    for name, code in (("bad", "exit 1"), ("good", f'echo "$@" >> {tmp_path}/calls')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run([script], env={"PYTHON": str(tmp_path / "bad"), "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and f"no ONNX Runtime with {provider}" in done.stderr
    assert "pip install onnxruntime-" in done.stderr
    subprocess.run([script], env={"PYTHON": str(tmp_path / "good"), "PATH": "/usr/bin:/bin"}, check=True)
    assert "-m dsv4c verify weights.dsv4 --on device" in (tmp_path / "calls").read_text()
    for model in (tmp_path / "device").glob("step.*.onnx"):
        onnx.checker.check_model(str(model), full_check=True)


def test_on_device_without_the_provider(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    path = built(models, "v4", "cuda:sm_90a", "exact")
    assert Artifact.open(path).meta["onnx"]["static"]["provider"][1] == {"use_tf32": "0"}
    assert main(["verify", str(path), "--on", "device"]) == 2
    error = capsys.readouterr().err
    assert "this ONNX Runtime has no CUDAExecutionProvider; allowed: " in error and KERNEL[0] in error
    assert "targets --check names the wheel" in error
    assert main(["verify", str(path), "--on", "device", "--programs", "x"]) == 2
    assert "nothing is converted" in capsys.readouterr().err
    with pytest.raises(ToolchainError, match="no CUDAExecutionProvider"):
        verify(Artifact.open(path), 1, provider_opener(Artifact.open(path)))


@pytest.mark.parametrize(("target", "message"), [
    ("cuda:sm_90", "cuda: unknown arch 'sm_90'; allowed: sm_100a, sm_120, sm_80, sm_89, sm_90a\n.*'sm_90a'"),
    ("cuda:90a", "cuda: unknown arch '90a'; allowed: .*sm_90a"),
    ("cuda:H200", "unknown arch 'H200'; allowed: .*\n.*hint: H200 is cuda:sm_90a"),
    ("cuda:4090", "hint: 4090 is cuda:sm_89"),
    ("rocm:mi300x", "hint: mi300x is rocm:gfx942"),
    ("rocm:gfx1100", "rocm: unknown arch 'gfx1100'; allowed: gfx90a, gfx942, gfx950"),
    ("nvidia", "unknown target 'nvidia'; allowed: ascend, cpu, cuda, mlu, rocm"),
])  # fmt: skip
def test_unknown_cards_list_the_known(target: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_target(target)
