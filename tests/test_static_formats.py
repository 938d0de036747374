"""FP8, FP4 and FP16 in artifacts of fixed shapes: what is stored, what it costs, what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from onnx import TensorProto
from support import usual_of
from test_model_harness import Models, feed
from test_static_artifact import SHAPES, built, divergence, models_of, models_text

import dsv4c
from dsv4c import api
from dsv4c.cli import main
from dsv4c.errors import TargetError, UsageError
from dsv4c.ir.packed import packed_form
from dsv4c.ir.weights import stream
from dsv4c.passes.weight_classes import weight_class
from dsv4c.quality import compile_measured
from dsv4c.runtime import Artifact, Session
from dsv4c.runtime.verify import verify
from dsv4c.targets import parse_target

FORMATS = (("ascend:950", "fast"), ("ascend:910c", "half"), ("ascend:950", "half"), ("mlu:590", "half"))


# -------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize(
    ("target", "numerics", "name"),
    usual_of(  # v4: test_every_arch_verifies_block_by_block
        ((*f, name) for f in FORMATS for name in ("v4_r16", "kjv")),
        lambda target, numerics, name: (name == "kjv") == (target == "ascend:950" and numerics == "fast"),
    ),
)
def test_every_format_verifies_block_by_block(
    models: Models, target: str, numerics: str, name: str
) -> None:
    checks = verify(Artifact.open(built(models, name, target, numerics)), threads=1)
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]
    assert sum(c.name.startswith("block") for c in checks) == 5


@pytest.mark.parametrize(
    ("target", "numerics", "least", "most"),
    [("ascend:950", "fast", 0.95, 0.005), ("mlu:590", "half", 0.99, 1e-4)],
)
def test_little_is_lost(
    models: Models, target: str, numerics: str, least: float, most: float
) -> None:
    """On the trained example's held-out text, against the model as stored; other arithmetic it is."""
    ids = models_text(models, 400)
    want = dsv4c.evaluate(models.module("kjv"), ids)
    session = Session(built(models, "kjv", target, numerics), threads=1)
    found = feed(session, ids, [len(ids)])
    assert (found.argmax(1) == want.argmax(1)).mean() > least
    assert 1e-7 < divergence(want, found) < most


def test_what_the_released_formats_cost_is_in_the_report(models: Models, tmp_path: Path) -> None:
    """The baseline is the same arch in exact numerics, whatever the arch is."""
    ids, path = models_text(models, 200), tmp_path / "m.dsv4"
    compile_measured(models.checkpoint("kjv"), ids, target="ascend:950", passes=SHAPES, output=path)
    report = Artifact.open(path).meta["report"]
    assert 0 < report["quality"]["kl"]["mean"] < 0.006 and report["quality"]["top1"] > 0.95


def test_codes_are_the_checkpoints_own(models: Models) -> None:
    """Every FP4 and FP8 tensor and every scale, bit for bit, but for the order of experts in their stack."""
    artifact = Artifact.open(built(models, "kjv", "ascend:950", "fast"))
    module, kinds = models.module("kjv"), Counter[str]()
    experts: dict[str, list[tuple[bytes, bytes]]] = {}
    for op in module.weights():
        held = packed_form(op.weight) if op.weight is not None else None
        if held is None or module.store is None:
            continue
        codes, scales = (b"".join(p.tobytes() for p in stream(x, module.store)) for x in held.parts)
        if weight_class(op) == "experts":
            layer, _, which = op.loc.partition(".experts.")
            where = f"{layer}.experts.{'w2' if '.w2' in which else 'w13'}"
            experts.setdefault(where, []).append((codes, scales))
        else:
            experts[op.loc] = [(codes, scales)]
        kinds[held.scheme.name] += 1
    assert kinds["mxfp4"] == 5 * 8 * 3 and kinds["fp8"] >= 5 * 8
    for name, parts in experts.items():
        codes, scales = artifact.tensors[name], artifact.tensors[f"{name}.scales"]
        assert bytes(artifact.array(name).tobytes()) == b"".join(c for c, _ in parts), name
        assert bytes(artifact.array(f"{name}.scales").tobytes()) == b"".join(s for _, s in parts), name
        assert codes.dtype in ("f8e4m3", "f4e2m1x2") and scales.dtype == "f8e8m0"


def test_bf16_checkpoints_become_mxfp8_and_mxfp4(models: Models) -> None:
    """And nothing else does: compressors, head and embedding stay numbers."""
    target, arch = parse_target("ascend:950")
    _, passes = api.in_numerics(target, arch, target.format(""))
    lowered = api.lower(models.module("ratio128"), "ascend:950", passes=passes).module
    found: dict[str, set[str]] = {}
    for op in lowered.weights():
        held = packed_form(op.weight) if op.weight is not None else None
        found.setdefault(weight_class(op), set()).add(held.scheme.name if held else "numbers")
    assert found["experts"] == {"mxfp4"} and found["shared"] == {"mxfp8"} and "mxfp8" in found["attention"]
    assert all(found[kind] == {"numbers"} for kind in ("compressor", "head", "embedding", "router"))


# ------------------------------------------------------------------------------- what is in the files


@pytest.mark.parametrize(("target", "numerics"), FORMATS)
def test_files_keep_to_the_table(models: Models, target: str, numerics: str) -> None:
    path, (family, arch) = built(models, "kjv", target, numerics), parse_target(target)
    dialect = family.dialect_of(arch)
    assert dialect is not None
    for model in models_of(path).values():
        versions = {o.domain: o.version for o in model.opset_import}
        assert versions[""] == dialect.opset <= 18 and versions.get("cpu.ops", 0) == dialect.runs_as
        for node in model.graph.node:
            known = dialect.nodes[f"{node.domain or 'ai.onnx'}::{node.op_type}"]
            assert any(low <= versions[node.domain] <= high for low, high in known)
        for tensor in model.graph.initializer:
            dialect.check_type(tensor.data_type, len(tensor.dims), tensor.name, "file")


def elements(path: Path, program: str) -> dict[str, int]:
    """Name of a stored tensor, under whatever shape it is seen -> its element type in one program."""
    stored = (t for t in models_of(path)[program].graph.initializer if t.external_data)
    return {t.name.partition(":")[0]: t.data_type for t in stored}


def test_types_of_weights(models: Models) -> None:
    for program in ("onnx.1", "onnx.24"):
        fp8 = elements(built(models, "kjv", "ascend:950", "fast"), program)
        assert fp8["layers.1.attn.wq_b.weight"] == TensorProto.FLOAT8E4M3FN
        assert fp8["layers.1.ffn.experts.w13"] == fp8["layers.1.ffn.experts.w2"] == TensorProto.UINT8
        assert fp8["layers.1.ffn.experts.w2.scales"] == TensorProto.UINT8
        assert fp8["head.weight"] == TensorProto.FLOAT
        half = elements(built(models, "kjv", "mlu:590", "half"), program)
        for name in ("attn.wq_b.weight", "attn.wo_a.weight", "ffn.experts.w13", "ffn.experts.w2"):
            assert half[f"layers.1.{name}"] == TensorProto.FLOAT16, name
        assert half["layers.1.ffn.gate.weight"] == half["embed.weight"] == TensorProto.FLOAT


@pytest.mark.parametrize("target", ["ascend:910c", "mlu:590"])
def test_fp16_products_are_of_fp16_numbers(models: Models, target: str) -> None:
    """No product decodes its FP16 matrix: every Cast away from FLOAT16 is of a result."""
    model = models_of(built(models, "kjv", target, "half"))["onnx.24"]
    halves = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
    readers = Counter(n.op_type for n in model.graph.node if not halves.isdisjoint(n.input))
    assert readers["Gemm"] > 40 and "Cast" not in readers


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("target", "numerics", "message"),
    [
        (
            "ascend:910c",
            "reference",
            "compile for ascend:910c: numerics 'reference'; allowed: fast, half, exact",
        ),
        (
            "cpu:x86-64-v3",
            "half",
            "compile for cpu:x86-64-v3: numerics 'half'; allowed: exact, bf16, int8, reference",
        ),
    ],
)
def test_unknown_numerics(models: Models, tmp_path: Path, target: str, numerics: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dsv4c.compile(models.checkpoint("v4"), output=tmp_path / "m.dsv4", target=target, numerics=numerics)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "front", "message"),
    [
        (
            "ascend:910c",
            'quantise_activations{rule="mxfp8"}',
            "layers.0.attn: rounding to E4M3 is of f8e4m3, which ascend lacks; allowed: bf16",
        ),
        (
            "mlu",
            'quantise_activations{rule="mxfp8"}',
            "layers.0.attn: rounding to E4M3 is of f8e4m3, which mlu lacks; allowed: bool",
        ),
        (
            "cpu",
            'requantise{experts="fp16"},quantise_activations{rule="fp16"}',
            "rounds by 'fp16', which format",
        ),
        (
            "cpu",
            'quantise_activations{rule="mxfp8"}',
            "expert_mlp rounds by 'mxfp8', which format tvm does not",
        ),
        (
            "mlu",
            "apply_reference_rounding",
            "rounds by 'reference', which format onnx does not; allowed: bf16",
        ),
    ],
)
def test_formats_a_device_lacks(
    models: Models, tmp_path: Path, target: str, front: str, message: str
) -> None:
    shapes = "" if target == "cpu" else ',with(bind_shapes{tokens="1", context=64})'
    with pytest.raises(TargetError, match=message):
        dsv4c.compile(
            models.checkpoint("v4"), output=tmp_path / "m.dsv4", target=target, numerics="exact",
            passes=f"{front},default{shapes}",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_every_arch_lists_its_numerics(capsys: pytest.CaptureFixture[str]) -> None:
    target, arch = parse_target("ascend:950")
    assert list(target.numerics_of(arch)) == list(target.numerics) == ["fast", "half", "exact"]
    assert "mxfp8" in target.numerics_of(arch)["fast"] and "int8" in target.numerics["fast"]
    assert main(["targets"]) == 0
    assert "for the ATC converter of CANN; numerics fast, half, exact" in capsys.readouterr().out


def test_passes_edit_what_numerics_made_of_the_pipeline() -> None:
    """What they put in front stays there; edits, and whole pipelines, are of what they left."""
    target, arch = parse_target("mlu:590")
    form = target.format("")
    for passes, storage in ((None, ["fp16"]), ("without(fuse_swiglu)", ["fp16"]), ("fuse_swiglu", []), (
        'with(narrow_weights{storage="f32"})', ["f32"])):  # fmt: skip
        name, pipeline = api.in_numerics(target, arch, form, "half", passes)
        assert name == "half" and [p.name for p in pipeline[:2]] == ["requantise", "quantise_activations"]
        assert [p.storage for p in pipeline if p.name == "narrow_weights"] == storage  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------- what it will cost


def test_estimates_count_the_stored_formats(models: Models) -> None:
    """Bytes of weights within one percent of the artifact's, whatever they are stored in."""
    for target, numerics in (*FORMATS, ("ascend:910c", "fast"), ("ascend:950", "exact")):
        artifact = Artifact.open(built(models, "kjv", target, numerics))
        (memory,) = artifact.meta["report"]["estimate"]["placement"]["memory"]
        stored = sum(t.nbytes for t in artifact.tensors.values() if not t.name.startswith("golden."))
        assert abs(memory["dense"] + memory["experts"] - stored) < 0.01 * stored, (target, numerics)


def test_estimates_take_the_peaks_of_the_formats(models: Models) -> None:
    """FP8 arithmetic on the 950, also for FP4 codes; FP16 where weights are FP16."""
    found = {}
    for target, numerics in (("ascend:950", "fast"), ("ascend:950", "half"), ("ascend:950", "exact")):
        report = Artifact.open(built(models, "kjv", target, numerics)).meta["report"]
        found[numerics] = report["estimate"]
    assert "fp4 weights are multiplied in fp8" in found["fast"]["assumptions"]
    assert not any("fp8 weights are" in line or "fp16 weights are" in line for n in found for line in
                   found[n]["assumptions"])  # fmt: skip
    read = {n: sum(part["weight_bytes"] for part in e["decode"]["parts"]) for n, e in found.items()}
    assert read["fast"] < read["half"] < read["exact"]
