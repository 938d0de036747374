"""The optimiser from the command line: explain, plug-ins, pruning measured and exported, numerics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_cli import Built, Call, built, dsv4c, ok, ok_json

from dsv4c import api
from dsv4c.ir import print_module
from dsv4c.passes import parse_pipeline, run_pipeline
from dsv4c.runtime import Session
from dsv4c.runtime.container import Artifact
from dsv4c.targets import TARGETS

__all__ = ["built", "dsv4c"]  # fixtures: pytest finds them by name

HELD_OUT = "In the beginning was the word 0123 and again the word 45"
PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from dsv4c.ir import Module
from dsv4c.passes import Effect, Pass

@dataclass(frozen=True)
class WidenClamp(Pass):
    name: ClassVar[str] = "widen_clamp"
    doc: ClassVar[str] = "clamp less"
    by: float = 1.0

    def run(self, module: Module) -> int:
        found = [op for op in module.ops if op.name == "clamped_swiglu"]
        for op in found:
            op.attrs["limit"] = op.attrs["limit"] * self.by
        return len(found)
'''
PRUNE = 'before(merge_common_subexpressions, prune_experts{{strength="saliency", keep=0.5, stats="{}"}})'


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.txt"
    path.write_text(HELD_OUT)
    return path


@pytest.fixture
def stats(dsv4c: Call, built: Built, tmp_path: Path) -> Path:
    path, words = tmp_path / "stats.npz", tmp_path / "calibration.txt"
    words.write_text("And God said 1 2 3 let there be light")
    ok(dsv4c("calibrate", built.checkpoint, "--text", words, "-o", path, "--threads", 1))
    return path


# ------------------------------------------------------------------------------------ explain


def test_opt_says_where_a_pass_does_not_apply(dsv4c: Call, tmp_path: Path) -> None:
    source = Path(__file__).parent / "filetests" / "fuse_expert_gemms_refuses.ir"
    first = source.read_text().split("// EXPECT")[0]
    (tmp_path / "g.ir").write_text(first)
    code, out, err = dsv4c("opt", tmp_path / "g.ir", "-p", "fuse_expert_gemms", "--explain")
    assert code == 0 and "expert_mlp" not in out
    assert err == "fuse_expert_gemms: @ffn: the experts differ in shape, limit or rounding\n"


def test_the_pipeline_explains_itself(built: Built) -> None:
    """Before every pass of the target's own pipeline: reasons by place, and the graph as it was."""
    module = api.load_checkpoint(built.checkpoint)
    reasons: dict[str, list[str]] = {}
    for one in parse_pipeline(TARGETS["cpu"].format("tvm").passes):
        before, notes = print_module(module), dict(module.notes)
        reasons[one.name] = one.explain(module)
        assert print_module(module) == before and module.notes == notes
        run_pipeline(module, (one,))
    assert reasons["fuse_swiglu"] == reasons["fuse_expert_gemms"] == []
    assert any("reads the ring as it was before this call" in r for r in reasons["fuse_rotary_write"])
    assert any("no other linear of these rows is stored as" in r for r in reasons["merge_projections"])
    assert all(" @" in f" {line}" and ": " in line for lines in reasons.values() for line in lines)


# ------------------------------------------------------------------- plug-ins, checked on the spot


def test_a_plugin_that_breaks_its_word_is_caught(dsv4c: Call, built: Built, tmp_path: Path) -> None:
    plugin, out = tmp_path / "mine.py", tmp_path / "m.dsv4"
    plugin.write_text(PLUGIN)
    words = ("-o", out, "--plugin", plugin, "--verify-passes", "--no-golden", "--json")
    command = ("compile", built.checkpoint, "--target", "cpu", *words)
    code, _, err = dsv4c(*command, "--passes", "after(fuse_swiglu, widen_clamp{by=0.01})")
    assert code == 2 and not out.exists()
    assert "widen_clamp" in err and "changes" in err and "clamped_swiglu" in err
    facts = ok_json(dsv4c(*command, "--passes", "after(fuse_swiglu, widen_clamp)"))
    record = next(p for p in facts["passes"] if p["name"].startswith("widen_clamp"))
    assert record["changes"] > 0 and max(record["changed"].values()) == 0
    assert all("changed" in p for p in facts["passes"]), "every pass was checked, not only the stranger's"


def test_a_plugin_is_no_part_of_the_next_compilation(dsv4c: Call, built: Built, tmp_path: Path) -> None:
    code, _, err = dsv4c(
        "compile", built.checkpoint, "--target", "cpu", "-o", tmp_path / "m.dsv4", "--passes", "widen_clamp"
    )
    assert code == 2 and "widen_clamp" in err and not (tmp_path / "m.dsv4").exists()


# ----------------------------------------------------------------- pruning, measured and reported


def test_pruning_is_measured_reported_and_exported(
    dsv4c: Call, built: Built, stats: Path, text: Path, tmp_path: Path
) -> None:
    out, page, checkpoint = tmp_path / "pruned.dsv4", tmp_path / "r.html", tmp_path / "small"
    ok(dsv4c(
        "compile", built.checkpoint, "--target", "cpu", "-o", out, "--passes", PRUNE.format(stats),
        "--heldout", text, "--random-seeds", 2, "--export-checkpoint", checkpoint,
    ))  # fmt: skip
    report = Artifact.open(out).meta["report"]
    quality = report["quality"]
    assert quality["tokens"] == len(HELD_OUT) and quality["kl"]["mean"] > 0
    assert 0 <= quality["top1"] < 1
    alone = ok_json(dsv4c("compare", built.artifact, out, "--text", text, "--json"))
    assert alone["after"]["perplexity"] == quality["after"]["perplexity"]
    assert len(set(quality["random"])) == 2 and quality["after"]["perplexity"] not in quality["random"]
    layers = report["notes"]["prune_experts"]["layers"]
    assert len(layers) == 4 and report["error_by_layer"]
    ok(dsv4c("report", out, "-o", page))
    html = page.read_text()
    for words in ("layers.3.ffn", "perplexity", "random, 2 seeds"):
        assert words in html, words
    again = tmp_path / "again.dsv4"
    ok(dsv4c("compile", checkpoint, "--target", "cpu", "-o", again))
    tokens = [[5, 6, 7, 8]]
    first, second = (Session(p).step(tokens) for p in (out, again))
    np.testing.assert_array_equal(first, second)


def test_what_cannot_be_measured_leaves_no_file(
    dsv4c: Call, built: Built, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.dsv4"
    command = ("compile", built.checkpoint, "--target", "cpu", "-o", out)
    for words, message in (
        (("--random-seeds", 2), "without --heldout"),
        (("--heldout", text, "--random-seeds", 2), "prune_experts"),
        (("--heldout", tmp_path / "absent"), "absent"),
        (("--heldout", text, "--passes", PRUNE.format(tmp_path / "none.npz")), "none.npz"),
        (("--export-checkpoint", built.checkpoint), str(built.checkpoint)),
        (("--numerics", "fast"), "fast"),
    ):
        code, _, err = dsv4c(*command, *words)
        assert code and message in err, (words, err)
        assert not list(tmp_path.glob("*.dsv4")) and not list(tmp_path.glob(".dsv4c-*"))


# ------------------------------------------------------------------------------ other numerics


def test_reference_numerics_are_named_and_run(dsv4c: Call, built: Built, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "reference.dsv4"
    facts = ok_json(dsv4c(
        "compile", built.checkpoint, "--target", "cpu", "-o", out, "--numerics", "reference", "--json",
        "--heldout", text,
    ))  # fmt: skip
    assert facts["numerics"] == "reference"
    assert any(p["name"].startswith("apply_reference_rounding") for p in facts["passes"])
    quality = Artifact.open(out).meta["report"]["quality"]
    assert 0 < quality["kl"]["mean"] < 0.1, "other rounding points, the same model"
    assert "reference" in ok(dsv4c("inspect", out))
    tokens = [[5, 6, 7, 8]]
    exact, rounded = Session(built.artifact).step(tokens), Session(out).step(tokens)
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.ptp(exact)
