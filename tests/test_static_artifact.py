"""Artifacts of fixed shapes, run through the very models that a device is given, against the judge."""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_model_harness import BETWEEN_CHUNKINGS, TOLERANCE, Arr, Models, feed, stored, within

import dsv4c
from dsv4c import api
from dsv4c.cli import main
from dsv4c.errors import ArtifactError, PassError, SessionError, TargetError, UsageError
from dsv4c.quality import compile_measured
from dsv4c.runtime import Artifact, Session
from dsv4c.runtime.unpack import unpack
from dsv4c.runtime.verify import verify
from dsv4c.targets import TARGETS
from dsv4c.targets.hardware import device

EXACT = ("ascend:910c", "mlu:590")
EVERY = [f"{t.name}:{a.name}" for t in TARGETS.values() if t.dialect for a in t.archs]
ALWAYS = ("ascend:910c", "ascend:950", "mlu:590", "cuda:sm_90a", "rocm:gfx942")
"""The archs that every run takes in all numerics; no two are emitted alike."""
ONCE = {
    "ascend:910b": "half", "ascend:910b3": "exact", "mlu:370": "fast", "cuda:sm_80": "fast",
    "cuda:sm_89": "exact", "cuda:sm_100a": "half", "cuda:sm_120": "fast", "rocm:gfx90a": "fast",
    "rocm:gfx950": "half",
}  # fmt: skip
"""The others differ from those in their figures more than in what is emitted."""
ARCHS = [
    pytest.param(target, numerics, marks=() if taken else pytest.mark.matrix)
    for target in EVERY
    for numerics in ("fast", "half", "exact")
    for taken in [target in ALWAYS or ONCE[target] == numerics]
]
EXACT_CODES = (("ascend:950", "fast"), ("rocm:gfx942", "fast"))
"""Where the released codes are kept and nothing, or nothing but by powers of two, is rounded."""
GOLDEN = ("v4", "v4_r16")
SHAPES = 'with(bind_shapes{tokens="1,24", batch=1, context=512})'


def built(models: Models, name: str, target: str, numerics: str, passes: str = SHAPES) -> Path:
    """The artifact of a checkpoint, made once."""
    return models.artifact(name, "onnx", target=target, numerics=numerics, passes=passes)


def golden(name: str) -> dict[str, Arr]:
    return stored(f"golden/{name}/golden.npz")


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("target", EXACT)
def test_exact_logits_however_the_prompt_is_cut(models: Models, target: str, name: str) -> None:
    """One token at a time, in programs that fit, and in calls of several programs; state carries over."""
    session = Session(built(models, name, target, "exact"), threads=1)
    ids, want = golden(name)["input_ids"], golden(name)["logits"]
    whole = feed(session, ids, [len(ids)])
    within(whole, want, TOLERANCE)
    assert (whole.argmax(1) == want.argmax(1)).all()
    for sizes in ([1] * len(ids), [24, 5, 1, 3]):
        session.reset()
        cut = sizes if sum(sizes) == len(ids) else [*sizes, len(ids) - sum(sizes)]
        within(feed(session, ids, cut), whole, BETWEEN_CHUNKINGS)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("target", EXACT)
def test_greedy_continuation_is_the_golden_one(models: Models, target: str, name: str) -> None:
    session, want = Session(built(models, name, target, "exact"), threads=1), golden(name)
    ids = want["input_ids"].tolist()
    logits, found = session.prefill([ids]), []
    for _ in want["generated_ids"]:
        found.append(int(logits[0].argmax()))
        logits = session.step([[found[-1]]])[:, 0]
    assert found == want["generated_ids"].tolist()


@pytest.mark.parametrize(("target", "numerics"), ARCHS)
def test_every_arch_verifies_block_by_block(models: Models, target: str, numerics: str) -> None:
    path = built(models, "v4", target, numerics)
    checks = verify(Artifact.open(path), threads=1)
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]
    blocks = [c.name for c in checks if c.name.startswith("block")]
    assert blocks == [f"block layers.{i}" for i in range(5)] and checks[-1].name == "logits"
    if numerics == "exact":
        assert max(c.error for c in checks) < 1e-5
    elif (target, numerics) not in EXACT_CODES:
        assert any(c.error > 1e-6 for c in checks)  # rounded inputs: it did take the other arithmetic


def test_int8_stays_near_the_model_as_stored(models: Models) -> None:
    """On the trained example: the same likeliest token nearly always, and little divergence."""
    ids = np.random.default_rng(3).integers(2, 2048, 200)
    ids[1:] = models_text(models, 199)
    want = dsv4c.evaluate(models.module("kjv"), ids)
    for target in EXACT:
        session = Session(built(models, "kjv", target, "fast"), threads=1)
        found = feed(session, ids, [len(ids)])
        assert (found.argmax(1) == want.argmax(1)).mean() > 0.95
        assert divergence(want, found) < 0.005


def models_text(models: Models, count: int) -> Arr:
    """Ids of the example's held-out text."""
    from tokenizers import Tokenizer

    folder = models.checkpoint("kjv")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return np.array(tokenizer.encode((folder.parent / "heldout.txt").read_text()[:4000]).ids[:count])


def divergence(want: Arr, found: Arr) -> float:
    """Mean KL divergence in nats."""
    p, q = (x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
            for x in (want.astype(np.float64), found.astype(np.float64)))  # fmt: skip
    return float((np.exp(p) * (p - q)).sum(1).mean())


def test_rows_of_a_batch(models: Models) -> None:
    """Three ragged rows in one program are what they are alone; a row without tokens keeps its state."""
    shapes = 'with(bind_shapes{tokens="1,16", batch=3, context=256})'
    path = built(models, "v4_r16", "ascend", "exact", shapes)
    alone = Session(built(models, "v4_r16", "ascend", "exact"), threads=1)
    together = Session(path, batch=3, threads=1)
    rng, rows = np.random.default_rng(1), [[], [], []]
    want: list[list[Arr]] = [[], [], []]
    for valid in ([16, 3, 0], [1, 1, 1], [0, 16, 40], [5, 1, 0], [1, 0, 1]):
        fed = rng.integers(0, 61, (3, max(valid)))
        logits = together.step(fed, valid)
        for b, count in enumerate(valid):
            rows[b] += fed[b, :count].tolist()
            want[b].append(logits[b, :count])
    for b, row in enumerate(rows):
        alone.reset()
        within(np.concatenate(want[b]), feed(alone, np.array(row), [len(row)]), BETWEEN_CHUNKINGS)


@pytest.mark.parametrize("stages", [2, 5])
def test_stages_are_the_model_in_pieces(models: Models, stages: int) -> None:
    """Bit for bit the same logits; every weight in one stage, but for what all of them compute."""
    shapes = SHAPES.replace("context=512", f"context=512, stages={stages}")
    path = built(models, "v4", "ascend", "exact", shapes)
    whole = Session(built(models, "v4", "ascend", "exact"), threads=1)
    pieces, ids = Session(path, threads=1), golden("v4")["input_ids"]
    sizes = [24, 1, 1, len(ids) - 26]
    assert np.array_equal(feed(pieces, ids, sizes), feed(whole, ids, sizes))
    assert all(np.array_equal(pieces.state[name], value) for name, value in whole.state.items())
    held: Counter[str] = Counter()
    for name, model in models_of(path).items():
        if name.startswith("onnx.1."):
            held.update(t.name for t in model.graph.initializer if t.name.startswith("layers."))
    assert set(held.values()) == {1}
    checks = verify(Artifact.open(path), threads=1)
    assert all(c.ok for c in checks) and sum(c.name.startswith("block") for c in checks) == 5


def test_more_stages_than_layers(models: Models, tmp_path: Path) -> None:
    passes = "with(bind_shapes{stages=6})"
    with pytest.raises(TargetError, match="6 devices; allowed: at most its 5 layers"):
        dsv4c.compile(models.checkpoint("v4"), output=tmp_path / "m.dsv4", target="mlu", passes=passes)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ what is in the files


def models_of(path: Path) -> dict[str, onnx.ModelProto]:
    artifact = Artifact.open(path)
    buckets = artifact.meta["onnx"]["static"]["buckets"]
    sections = [f"onnx.{program['name']}" for bucket in buckets for program in bucket["programs"]]
    return {name: onnx.load_from_string(bytes(artifact.section(name))) for name in sections}


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("target", EXACT)
def test_models_keep_to_the_table_and_have_no_unknown_size(
    models: Models, target: str, numerics: str
) -> None:
    path, dialect = built(models, "v4", target, numerics), TARGETS[target.split(":")[0]].dialect
    assert dialect is not None
    for model in models_of(path).values():
        versions = {o.domain: o.version for o in model.opset_import}
        assert versions[""] == dialect().opset <= 18
        for node in model.graph.node:
            known = dialect().nodes[f"{node.domain or 'ai.onnx'}::{node.op_type}"]
            assert any(low <= versions[node.domain] <= high for low, high in known)
        for info in (*model.graph.input, *model.graph.output):
            assert all(d.HasField("dim_value") for d in info.type.tensor_type.shape.dim)
        carried = {(f.domain, f.name) for f in model.functions}
        assert {(n.domain, n.op_type) for n in model.graph.node if n.domain} == carried
        for function in model.functions:
            assert all(not node.domain for node in function.node)


def test_vendor_nodes_are_used_where_there_are_some(models: Models) -> None:
    (model, _) = models_of(built(models, "v4", "ascend:910c", "fast")).values()
    found = Counter(node.op_type for node in model.graph.node if node.domain)
    assert set(found) == {"NPURmsNorm", "NPURotaryPositionEmbedding", "NPUDynamicQuant", "QuantBatchMatMul"}
    (model, _) = models_of(built(models, "v4", "mlu", "fast")).values()
    assert {node.domain for node in model.graph.node} == {""}
    elements = {t.data_type for t in model.graph.initializer if t.dims and np.prod(t.dims) > 4096}
    assert onnx.TensorProto.INT8 in elements


def test_a_wrong_weight_is_found_at_its_layer(models: Models, tmp_path: Path) -> None:
    """Scales of one matrix times 1.5: the first check that fails names the layer."""
    artifact = Artifact.open(built(models, "v4", "ascend:910c", "fast"))
    (name,) = [n for n in artifact.tensors if n == "layers.2.attn.wo_b.weight.scales"]
    place, data = artifact.tensors[name], bytearray(artifact.path.read_bytes())
    at = slice(place.offset, place.offset + place.nbytes)
    data[at] = (np.frombuffer(bytes(data[at]), np.float32) * np.float32(1.5)).tobytes()
    (tmp_path / "bad.dsv4").write_bytes(data)
    first = next(c for c in verify(Artifact.open(tmp_path / "bad.dsv4"), threads=1) if not c.ok)
    assert first.name == "block layers.2"  # it leaves no state in its own layer


# ------------------------------------------------------------------------------------ on the device


def test_unpacked_models_are_those_that_were_verified(models: Models, tmp_path: Path) -> None:
    path = built(models, "v4", "mlu:590", "exact")
    files = unpack(Artifact.open(path), tmp_path / "device")
    names = {f.relative_to(tmp_path / "device").as_posix() for f in files}
    assert {"step.1.onnx", "step.24.onnx", "weights.dsv4", "build.sh", "bang/tiling.h"} <= names
    for count in (1, 24):
        onnx.checker.check_model(str(tmp_path / "device" / f"step.{count}.onnx"), full_check=True)
    with pytest.raises(UsageError, match="exists already"):
        unpack(Artifact.open(path), tmp_path / "device")
    assert not list(tmp_path.glob(".unpack-*"))
    linked = unpack(Artifact.open(path), tmp_path / "linked", link=True)
    assert [f.stat().st_ino for f in linked if f.name == "weights.dsv4"] == [path.stat().st_ino]


def test_only_fixed_shapes_unpack(models: Models, tmp_path: Path) -> None:
    artifact = Artifact.open(models.artifact("v4", "onnx"))
    with pytest.raises(ArtifactError, match="holds nothing that a converter reads"):
        unpack(artifact, tmp_path / "device")
    assert not (tmp_path / "device").exists()


def test_build_script_converts_every_program(models: Models, tmp_path: Path) -> None:
    """With a stand-in for the converter that keeps its arguments."""
    unpack(Artifact.open(built(models, "v4", "ascend:910b", "fast")), tmp_path / "device")
    script = tmp_path / "device" / "build.sh"
    bare = subprocess.run([script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert bare.returncode == 1 and "atc is not on the PATH" in bare.stderr
    tool = tmp_path / "atc"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    tool.chmod(0o755)
    subprocess.run([script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True, capture_output=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--framework=5 --model=step.{n}.onnx --output=om/step.{n} --soc_version=Ascend910B1"
        " --precision_mode_v2=origin --external_weight=1"
        for n in (1, 24)
    ]


# ----------------------------------------------------------------------------------------- refusals


def test_sessions_keep_to_what_was_compiled(models: Models) -> None:
    path = built(models, "v4", "ascend", "exact")
    for sizes in ({"batch": 2}, {"context": 513}):
        with pytest.raises(UsageError, match="a batch of 1, a context of 512 at most, as compiled"):
            Session(path, **sizes)
    short = Session(path, context=40, threads=1)
    with pytest.raises(SessionError, match="the context is full: 41 positions"):
        short.step(np.zeros((1, 41), int))
    assert short.step(np.zeros((1, 40), int)).shape[1] == 40


@pytest.mark.parametrize(
    ("passes", "error", "message"),
    [
        ('with(bind_shapes{tokens="1,x"})', PassError, "option tokens = '1,x'"),
        ("with(bind_shapes{batch=0})", PassError, "option batch = 0; allowed: 1 or more"),
        ('with(bind_shapes{tokens="600", context=512})', PassError, "a program of 600 tokens"),
        ("without(bind_shapes)", TargetError, "shapes are not bound"),
        ('with(narrow_weights{storage="packed"})', None, ""),
        ("without(fuse_expert_gemms)", TargetError, "layers.0.ffn: dispatch is not legal here"),
    ],
)
def test_bad_pipelines(
    models: Models, tmp_path: Path, passes: str, error: type[Exception] | None, message: str
) -> None:
    def compile() -> None:
        dsv4c.compile(models.checkpoint("v4"), output=tmp_path / "m.dsv4", target="ascend", passes=passes)

    if error is None:
        compile()
        return
    with pytest.raises(error, match=message):
        compile()
    assert not list(tmp_path.iterdir())


def test_reference_numerics_are_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="numerics 'reference'; allowed: fast, half, exact"):
        dsv4c.compile(models.checkpoint("v4"), output=tmp_path / "m.dsv4", target="mlu", numerics="reference")
    assert not list(tmp_path.iterdir())


def test_a_prompt_longer_than_the_context_is_no_golden_one(models: Models) -> None:
    shapes = 'with(bind_shapes{tokens="1,8", batch=1, context=16})'
    path = built(models, "v4", "mlu", "exact", shapes)
    with pytest.raises(ArtifactError, match="was compiled for 16 positions, its golden prompt has 28"):
        verify(Artifact.open(path))


# ----------------------------------------------------------------------------- what it will cost there


def test_the_artifact_carries_an_estimate(models: Models, tmp_path: Path) -> None:
    """For the device of the arch, split as the artifact is, and shown in the report."""
    shapes = SHAPES.replace("context=512", "context=512, stages=2")
    path = built(models, "v4", "ascend:910c", "fast", shapes)
    found = Artifact.open(path).meta["report"]["estimate"]
    assert found["device"]["name"] == "ascend-910c-die" and found["devices"] == 2
    assert found["placement"]["fits"] and len(found["placement"]["memory"]) == 2
    assert found["decode"]["seconds"] > 0 and found["decode"]["bound"] == "memory"
    assert main(["report", str(path), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "An estimate, not a measurement: 2 x ascend-910c-die" in page and "0 to" in page
    unknown = Artifact.open(built(models, "v4", "mlu:590", "fast")).meta["report"]["estimate"]
    assert unknown["decode"]["seconds"] is None and unknown["decode"]["weight_bytes"] > 0


def test_exact_numerics_count_as_they_are_stored(models: Models) -> None:
    total = {}
    for numerics in ("fast", "exact"):
        path = built(models, "kjv", "ascend:910c", numerics)
        (memory,) = Artifact.open(path).meta["report"]["estimate"]["placement"]["memory"]
        total[numerics] = memory["dense"] + memory["experts"]
    assert 2 < total["exact"] / total["fast"] < 4


def test_a_model_too_large_is_refused_before_its_weights_are_written(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(device("ascend-910c-die"), memory=4_000_000)
    monkeypatch.setattr(api, "known_devices", lambda plugins: {small.name: small})
    monkeypatch.setattr("dsv4c.targets.onnx.emit_static.store_weight", None)
    message = r"(?s)the model needs \d+ bytes on 1 devices.*--devices \d fits"
    with pytest.raises(TargetError, match=message):
        dsv4c.compile(models.checkpoint("v4"), output=tmp_path / "m.dsv4", target="ascend", passes=SHAPES)
    assert not list(tmp_path.iterdir())


def test_held_out_text_is_measured_against_exact_numerics(models: Models, tmp_path: Path) -> None:
    """What INT8 costs goes into the report: quality on text, and the error by layer."""
    ids = models_text(models, 200)
    path = compile_measured(
        models.checkpoint("kjv"), ids, target="mlu", passes=SHAPES, output=tmp_path / "m.dsv4"
    )
    report = Artifact.open(path).meta["report"]
    assert 0 < report["quality"]["kl"]["mean"] < 0.005 and report["quality"]["top1"] > 0.95
    assert max(layer["max"] for layer in report["error_by_layer"]) > 1e-4
