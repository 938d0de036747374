"""DeepSeek-V4.1 in programs of fixed shapes: the golden model in two dialects, in stages, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_model_harness import BETWEEN_CHUNKINGS, Arr, Models, cuts, within
from test_v41_golden import feed, golden, image_rows

from dsv4c.errors import SessionError, TargetError
from dsv4c.ir import weights as w
from dsv4c.ir.dims import sym
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Builder, Module
from dsv4c.ir.types import f32, i32
from dsv4c.runtime import Artifact, Session
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.runtime.verify import failures, verify
from dsv4c.targets import TARGETS
from dsv4c.targets.onnx.emit_static import emit_static
from dsv4c.targets.stages import STREAMS, split

EXACT = ("ascend:910c", "mlu:590")
SHAPES = 'with(bind_shapes{tokens="1,24", batch=1, context=512})'
B, T = sym("B"), sym("T")


def built(models: Models, target: str, numerics: str, passes: str = SHAPES) -> Path:
    checked = {} if passes == SHAPES else {"golden": False}
    return models.artifact("v41", "onnx", target=target, numerics=numerics, passes=passes, **checked)


def with_shapes(**options: int) -> str:
    return SHAPES.replace(
        "context=512", ", ".join(f"{k}={v}" for k, v in {"context": 512, **options}.items())
    )


@pytest.mark.parametrize(("target", "name"), [
    ("ascend:910c", "v41"), ("mlu:590", "v41_text"),
    pytest.param("mlu:590", "v41", marks=pytest.mark.matrix),
    pytest.param("ascend:910c", "v41_text", marks=pytest.mark.matrix),
])  # fmt: skip
def test_exact_logits_however_the_prompt_is_cut(models: Models, target: str, name: str) -> None:
    """Whole, in single tokens, and in calls of several programs that each take some rows of the image."""
    session = Session(built(models, target, "exact"), threads=1)
    want, ids, rows = golden(name)["logits"], golden(name)["input_ids"], image_rows(name)
    for sizes in ([len(ids)], [1] * len(ids), cuts(len(ids), 3)):
        session.reset()
        found = feed(session, ids, sizes, rows)
        within(found, want, BETWEEN_CHUNKINGS)
        assert (found.argmax(1) == want.argmax(1)).all()


@pytest.mark.parametrize("target", ["mlu:590", pytest.param("ascend:910c", marks=pytest.mark.matrix)])
def test_sixteen_greedy_tokens(models: Models, target: str) -> None:
    session, want = Session(built(models, target, "exact"), threads=1), golden("v41")
    logits, found = session.prefill([want["input_ids"].tolist()], images=[image_rows("v41")]), []
    for _ in want["generated_ids"]:
        found.append(int(logits[0].argmax()))
        logits = session.step([[found[-1]]])[:, 0]
    assert found == want["generated_ids"].tolist()


@pytest.mark.parametrize("target", EXACT)
def test_every_block_verifies(models: Models, target: str) -> None:
    checks = verify(Artifact.open(built(models, target, "exact")), threads=1)
    assert [c.name for c in checks if c.name.startswith("block")] == [f"block layers.{i}" for i in range(8)]
    assert "state engram.history" in {c.name for c in checks}
    assert max(c.error for c in checks) < 1e-5


@pytest.mark.parametrize(
    "stages", [pytest.param(2, marks=pytest.mark.matrix), 3, pytest.param(8, marks=pytest.mark.matrix)]
)
def test_stages_are_the_model_in_pieces(models: Models, stages: int) -> None:
    """Bit for bit the same logits; what layers publish crosses the borders, and no weight is there twice."""
    path = built(models, "ascend", "exact", with_shapes(stages=stages))
    whole = Session(built(models, "ascend", "exact"), threads=1)
    pieces, ids, rows = Session(path, threads=1), golden("v41")["input_ids"], image_rows("v41")
    sizes = [24, 1, 1, len(ids) - 26]
    assert np.array_equal(feed(pieces, ids, sizes, rows), feed(whole, ids, sizes, rows))
    programs = pieces.artifact.meta["onnx"]["static"]["buckets"][0]["programs"]
    assert [p["stage"] for p in programs] == list(range(stages))
    held: list[set[str]] = []
    for program in programs:
        model = onnx.load_from_string(pieces.artifact.section(f"onnx.{program['name']}"))
        held.append({i.name for i in model.graph.initializer if i.name.startswith("layers.")})
    assert sum(map(len, held)) == len(set.union(*held))


def test_what_crosses_a_border(models: Models) -> None:
    """One layer a stage: streams and collapse weights always, what layer 4 publishes as far as it is read."""
    path = built(models, "ascend", "exact", with_shapes(stages=8))
    programs = Artifact.open(path).meta["onnx"]["static"]["buckets"][0]["programs"]
    borders = [{n for n in p["border"]["inputs"] if n.endswith(".in")} for p in programs]
    assert borders[0] == set() and all(f"{STREAMS}.in" in found for found in borders[1:])
    assert all(sum("hc_ffn.hc_mix" in n for n in found) == 1 for found in borders[1:])
    entries = [stage for stage, found in enumerate(borders) if "layers.4.entries.after.in" in found]
    keys = [stage for stage, found in enumerate(borders) if "layers.4.index.entries.after.in" in found]
    assert (entries, keys) == ([5, 6, 7], [6])  # layers 5 to 7 attend to them, layer 6 selects among them
    assert [s for s, found in enumerate(borders) if any("index_candidates" in n for n in found)] == [5, 6]
    assert all("layers.4.entries" in programs[stage]["border"]["inputs"] for stage in entries)


def test_candidates_that_are_all_there_is_cost_nothing(models: Models) -> None:
    """With room for no more blocks than are kept, a selection is not restricted, and marks nothing."""
    few = built(models, "mlu", "exact", 'with(bind_shapes{tokens="16", batch=1, context=64})')
    assert count_nodes(few, "ScatterElements") == 1
    ids = golden("v41_text")["input_ids"][:16]
    tiny = 'with(bind_shapes{tokens="4", batch=1, context=16})'
    session = Session(built(models, "mlu", "exact", tiny), threads=1)
    assert count_nodes(session.artifact.path, "ScatterElements") == 0
    within(
        feed(session, ids, [16], image_rows("v41_text")), golden("v41_text")["logits"][:16], BETWEEN_CHUNKINGS
    )


def count_nodes(path: Path, kind: str) -> int:
    """In the first program of an artifact."""
    artifact = Artifact.open(path)
    name = artifact.meta["onnx"]["static"]["buckets"][0]["programs"][0]["name"]
    return sum(n.op_type == kind for n in onnx.load_from_string(artifact.section(f"onnx.{name}")).graph.node)


def test_rows_of_a_batch(models: Models) -> None:
    """An image beside a text in one program, fed in ragged calls, are what they are alone."""
    passes = 'with(bind_shapes{tokens="1,16", batch=2, context=128})'
    session = Session(built(models, "mlu", "exact", passes), batch=2, threads=1)
    a, b = golden("v41"), golden("v41_text")
    prompts = [a["input_ids"].tolist(), b["input_ids"].tolist()]
    logits = session.prefill(prompts, chunk=21, images=[image_rows("v41"), image_rows("v41_text")])
    for found, want in zip(logits, (a, b), strict=True):
        within(found, want["logits"][-1], BETWEEN_CHUNKINGS)


@pytest.mark.parametrize("target", ["mlu:590", pytest.param("ascend:910c", marks=pytest.mark.matrix)])
def test_int8_keeps_most_of_the_likeliest_tokens(models: Models, target: str) -> None:
    """A random model whose router and index decide by gaps of 1e-4: the released rounding keeps 56 %."""
    session, want = Session(built(models, target, "fast"), threads=1), golden("v41_text")
    found = feed(session, want["input_ids"], [len(want["input_ids"])], image_rows("v41_text"))
    assert np.isfinite(found).all()
    agreement = float((found.argmax(1) == want["logits"].argmax(1)).mean())
    print(f"{target}: {agreement:.2f}")
    assert agreement > 0.6
    assert not failures(verify(session.artifact, threads=1))


# ----------------------------------------------------------------------------------- refusals


def test_an_image_is_encoded_elsewhere(models: Models) -> None:
    session = Session(built(models, "ascend:910c", "exact"), threads=1)
    with pytest.raises(SessionError, match=r"(?s)takes rows of images but encodes none.*artifact for cpu"):
        session.encode_image(golden("v41")["image.pixels"].astype(np.uint8))
    with pytest.raises(SessionError, match="no program 'vision' of fixed shapes"):
        session.backend.call_part("vision", [])


class _Store:
    """Every tensor is zero."""

    def __init__(self, tensors: dict[str, Arr]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Arr:
        return self.tensors[name]


def lacking(target: str, node: str) -> Any:
    dialect = TARGETS[target].dialect
    assert dialect is not None
    whole = dialect()
    return replace(whole, nodes={k: v for k, v in whole.nodes.items() if k != f"ai.onnx::{node}"})


def one_op(kind: str) -> Module:
    """A module of fixed shapes with one op that only V4.1 has."""
    module = Module("case")
    b = Builder(module)
    b.loc = "layers.3.odd"
    pos, n_valid, tokens = b.state("pos", i32(B)), b.input("n_valid", i32(B)), b.input("tokens", i32(B, T))
    q, weights = b.input("q", f32(B, T, 2, 4)), b.input("weights", f32(B, T, 2))
    if kind == "merge_images":
        images, count = b.input("images", f32(B, sym("I"), 4)), b.input("n_images", i32(B))
        made = b.op(kind, b.input("x", f32(B, T, 4)), tokens, images, count, image_token=7)
    elif kind == "index_select":
        rows, state = b.input("new", f32(B, T, 4)), b.state("e", f32(B, sym("ctx"), 4))
        keys = b.op("entries_append", state, rows, pos, n_valid, ratio=1)
        module.outputs["e"] = keys
        made = b.op(
            kind, q, weights, keys, pos, n_valid, b.input("blocks", i32(B, T, 2)), ratio=1, k=3, size=2
        )
    else:
        turned = b.multi("grid_angles", b.input("places", i32(B, T, 2)), b.input("frequencies", f32(1)))
        made = b.op("rotary", q, *turned.results, halves=True)
    module.outputs |= {"y": made, "pos": b.op("advance", pos, n_valid)}
    module.meta["static_shapes"] = {"batch": 1, "context": 32, "tokens": [4], "stages": 1}
    return module


@pytest.mark.parametrize(("target", "op", "node"), [
    ("ascend", "merge_images", "CumSum"), ("mlu", "merge_images", "CumSum"),
    ("ascend", "index_select", "ScatterElements"), ("mlu", "index_select", "ScatterElements"),
])  # fmt: skip
def test_a_node_that_is_missing_is_refused_with_its_place(
    tmp_path: Path, target: str, op: str, node: str
) -> None:
    with ArtifactWriter(tmp_path / "good.dsv4") as writer:
        emit_static(one_op(op), _Store({}), writer, TARGETS[target].dialect())  # type: ignore[misc]
    with (
        pytest.raises(TargetError, match=rf"layers\.3\.odd: {target} has no ai\.onnx::{node}"),
        ArtifactWriter(tmp_path / "bad.dsv4") as writer,
    ):
        emit_static(one_op(op), _Store({}), writer, lacking(target, node))


def test_rotation_of_halves_has_no_fixed_shapes(tmp_path: Path) -> None:
    with (
        pytest.raises(TargetError, match=r"layers\.3\.odd: rotary of halves"),
        ArtifactWriter(tmp_path / "bad.dsv4") as writer,
    ):
        emit_static(one_op("rotary"), _Store({}), writer, TARGETS["mlu"].dialect())  # type: ignore[misc]


def test_a_state_of_another_stage_is_refused_but_for_entries() -> None:
    """A layer may read what another publishes, not the window it keeps."""
    module = Module("case")
    b = Builder(module)
    pos, n_valid, tokens = b.state("pos", i32(B)), b.input("n_valid", i32(B)), b.input("tokens", i32(B, T))
    x = b.op(
        "repeat_streams", b.op("embed", tokens, b.weight(w.source("e", DType.F32, (9, 4)), "embed")), n=2
    )
    ring = b.state("layers.0.window", f32(B, 8, 4))
    for layer in range(2):
        b.loc = f"layers.{layer}.hc_ffn"
        pre = b.op("gather_rows", ring, tokens)
        mixed = [b.input(f"{name}{layer}", f32(B, T, *shape)) for name, shape in (("p", (2,)), ("c", (2, 2)))]
        x = b.op("hc_expand", x, pre, *mixed)
    module.outputs["layers.0.window"] = b.op("ring_write", ring, pre, pos, n_valid)
    b.loc = "head"
    module.outputs["logits"] = b.op("hc_collapse", x, b.input("pre", f32(B, T, 2)))
    module.outputs["pos"] = b.op("advance", pos, n_valid)
    assert len(split(module, 1, {})) == 1
    with pytest.raises(
        TargetError, match=r"layers 1 to 1 read layers\.0\.window; allowed: of other stages only"
    ):
        split(module, 2, {})
