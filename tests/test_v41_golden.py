"""DeepSeek-V4.1 against results of an independent evaluator in float64, in data/golden.

"v41" has a prompt with an image, "v41_text" one of text; both are of the checkpoint "v41": Engram layers,
shared compressed attention with ratios 2 and 1, candidate blocks, a vision tower, draft layers that are kept.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_model_harness import BETWEEN_CHUNKINGS, TOLERANCE, Arr, Models, cuts, stored, within

from dsv4c import Session, compile
from dsv4c.errors import SessionError
from dsv4c.ir.streams import stream_values
from dsv4c.runtime import verify as runtime_verify
from dsv4c.runtime.engram import TableOptions
from dsv4c.runtime.images import ImageRules, load_patches
from dsv4c.runtime.images.rows import ImageFeed
from dsv4c.runtime.images.tower import tower_inputs

NAMES = ("v41", "v41_text")
IMAGE = 510


def golden(name: str) -> dict[str, Arr]:
    return stored(f"golden/{name}/golden.npz")


def image_rows(name: str) -> Arr:
    """The embeddings of the prompt's image tokens, [n,d]."""
    want = golden(name)
    return np.asarray(want["embeddings"][want["input_ids"] == IMAGE], np.float32)


def feed(session: Session, ids: Arr, sizes: list[int], rows: Arr) -> Arr:
    """Logits of `ids` in calls of these sizes, with the image rows of each."""
    given, out, at = ImageFeed([rows], ids[None], np.array([len(ids)]), IMAGE, rows.shape[1]), [], 0
    for count in sizes:
        part = ids[None, at : at + count].astype(np.int32)
        taken = given.take(part, np.array([part.shape[1]]))
        images = [taken.rows[0, : taken.counts[0]]] if taken.counts[0] else None
        out.append(session.step(part, images=images)[0])
        at += count
    return np.concatenate(out)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("precision", "tolerance"), [(np.float64, 1e-6), (np.float32, TOLERANCE)])
def test_streams_rows_and_logits(models: Models, name: str, precision: type, tolerance: float) -> None:
    """By the evaluator: the streams after every block, the rows of both Engram layers, the logits."""
    want, module = golden(name), models.module("v41")
    ids, rows = want["input_ids"], image_rows(name)
    inputs = {
        "tokens": ids[None], "n_valid": np.array([len(ids)]), "rows": np.arange(len(ids))[None],
        "images": rows[None] if len(rows) else np.zeros((1, 1, want["embeddings"].shape[1])),
        "n_images": np.array([len(rows)]),
    }  # fmt: skip
    evaluator = models.evaluator("v41", precision)
    done = evaluator(inputs, evaluator.fresh_state(B=1, ctx=len(ids)), trace=True)
    values = {v: r[i] for op, r in done.trace.items() for i, v in enumerate(op.results)}
    streams = stream_values(module)
    assert len(streams) == len(want["streams"]) == 8
    for (layer, value), expected in zip(streams.items(), want["streams"], strict=True):
        within(values[value][0], expected, tolerance, f"streams of {layer}")
    for layer in (1, 3):
        (op,) = (op for op in module.ops if op.name == "ngram_rows" and op.loc == f"layers.{layer}.engram")
        np.testing.assert_array_equal(values[op.result][0], want[f"engram.rows.{layer}"])
        assert op.attrs["multipliers"] == tuple(want["engram.multipliers"][(1, 3).index(layer)].tolist())
    within(done.outputs["logits"][0], want["logits"], tolerance)
    assert (done.outputs["logits"][0].argmax(1) == want["logits"].argmax(1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_however_it_is_fed(models: Models, name: str) -> None:
    """Whole, token by token and cut at random, also inside the image: golden logits, bit for bit the same."""
    want, ids = golden(name)["logits"], golden(name)["input_ids"]
    whole = feed(models.session("v41", "tvm"), ids, [len(ids)], image_rows(name))
    within(whole, want, TOLERANCE, "whole")
    for sizes in ([1] * len(ids), cuts(len(ids), 1), cuts(len(ids), 2)):
        found = feed(models.session("v41", "tvm"), ids, sizes, image_rows(name))
        np.testing.assert_array_equal(found, whole)
        assert (found.argmax(1) == want.argmax(1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_greedy_tokens(models: Models, name: str) -> None:
    want, session = golden(name), models.session("v41", "tvm")
    rows = image_rows(name)
    images = [rows] if len(rows) else None
    logits = session.prefill([want["input_ids"].tolist()], chunk=7, images=images)
    for token, expected in zip(want["generated_ids"], want["generated_logits"], strict=True):
        within(logits[0], expected, TOLERANCE)
        assert logits[0].argmax() == token
        logits = session.step([[token]])[:, -1]


def test_a_batch_of_an_image_and_a_text(models: Models) -> None:
    """Rows of different lengths side by side, one of them with an image."""
    a, b = golden("v41"), golden("v41_text")
    session = models.session("v41", "tvm", batch=2)
    prompts = [a["input_ids"].tolist(), b["input_ids"].tolist()]
    logits = session.prefill(prompts, chunk=11, images=[image_rows("v41"), image_rows("v41_text")])
    for found, want in zip(logits, (a, b), strict=True):
        within(found, want["logits"][-1], TOLERANCE)


def test_the_tower_and_its_span(models: Models) -> None:
    """From the pixels: patches bit for bit, the tower, and the rows of the span; then the whole prompt."""
    want, session = golden("v41"), models.session("v41", "tvm")
    pixels = want["image.pixels"].astype(np.uint8)
    rules = ImageRules.from_meta(session.model["vision"])
    loaded = load_patches(pixels, rules)
    bits = want["image.patches"].astype(np.uint32) << 16
    np.testing.assert_array_equal(loaded.patches, bits.view(np.float32))
    found = session.backend.call_part("vision", tower_inputs(loaded, rules.downsample))
    within(found["tower"][0], want["vision.tower"], TOLERANCE)
    within(found["rows"][0], want["vision.span"], TOLERANCE)
    ids = want["input_ids"]
    first, last = np.flatnonzero(ids == IMAGE)[[0, -1]]
    short = [*ids[: first + 1].tolist(), *ids[last + 1 :].tolist()]
    expanded, images = session.with_images(short, [pixels])
    assert expanded == ids.tolist()
    within(session.prefill([expanded], images=images)[0], want["logits"][-1], TOLERANCE)


def test_image_tokens_need_their_rows(models: Models) -> None:
    session, ids = models.session("v41", "tvm"), golden("v41")["input_ids"].tolist()
    with pytest.raises(SessionError, match="no images are given"):
        session.prefill([ids])
    with pytest.raises(SessionError, match="one row for every image token"):
        session.prefill([ids], images=[image_rows("v41")[1:]])
    assert session.position[0] == 0


def test_the_artifact_verifies_itself(models: Models) -> None:
    checks = runtime_verify.verify(models.session("v41", "tvm").artifact, threads=1)
    assert {"vision rows", "state engram.history", "logits"} <= {c.name for c in checks}
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]


@pytest.mark.parametrize("cache", [8 * 4096, 1 << 20])
def test_tables_on_disk_give_the_bits_of_tables_in_memory(models: Models, cache: int) -> None:
    path = models.artifact("v41", "tvm")
    ids, rows = golden("v41")["input_ids"], image_rows("v41")
    resident = Session(path, context=64, threads=1, tables=TableOptions("resident"))
    disk = Session(path, context=64, threads=1, tables=TableOptions("disk", cache))
    sizes = cuts(len(ids), 4)
    np.testing.assert_array_equal(feed(disk, ids, sizes, rows), feed(resident, ids, sizes, rows))
    counts = disk.table_statistics()
    assert set(counts) == {"layers.1.engram.embed", "layers.3.engram.embed"}
    assert all(c["tier"] == "disk" and c["rows"] == 6 * len(ids) and c["read"] > 0 for c in counts.values())
    assert all(c["read"] == 0 for c in resident.table_statistics().values())


PIPELINES = (
    "without(fuse_index_select),without(fuse_hyper)",
    "without(fuse_norm_rotary),without(fuse_rotary_write),without(merge_projections),without(layout_engram)",
)


@pytest.mark.parametrize("passes", PIPELINES)
def test_other_pipelines_mean_the_same(models: Models, passes: str, tmp_path: Path) -> None:
    path = compile(models.checkpoint("v41"), output=tmp_path / "m.dsv4", passes=passes, golden=False)
    ids = golden("v41")["input_ids"]
    found = feed(Session(path, context=64, threads=1), ids, [len(ids)], image_rows("v41"))
    within(found, golden("v41")["logits"], BETWEEN_CHUNKINGS)
