"""The reference's numerics against an independent evaluation with its rounding points, official.npz.

That evaluation holds BF16 and FP32 tensors and adds in float64; `Fp32Tensors` does the same, except inside an
op, where nothing is rounded. A value very near a BF16 tie may thus round the other way. Once one does, values
behind it change by whole steps of E4M3, and the rows after it, which attend to it, agree no better than two
different roundings do. So rows are compared up to the first such flip, and until then bit for bit: 27 rows of
"v4" and 40 of "v4_r16" (all but its last).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_model_harness import Arr, Judge, Models, feed, stored

import dsv4c
from dsv4c import api
from dsv4c.errors import PassError, TargetError, UsageError
from dsv4c.ir.clone import clone
from dsv4c.ir.dtypes import bf16_to_f32
from dsv4c.ir.graph import Module, Op
from dsv4c.ir.meaning import Evaluator, attention, quantise
from dsv4c.ir.meaning import core as core_meaning
from dsv4c.ir.meaning import moe as moe_meaning
from dsv4c.ir.meaning import rounding as rounding_meaning
from dsv4c.ir.types import TensorType
from dsv4c.passes import parse_pipeline, run_pipeline
from dsv4c.passes.reference_rounding import POINTS

ROWS = {"v4": 27, "v4_r16": 40}
"""Rows before the first flip."""


def rounded(models: Models, name: str, pipeline: str = "apply_reference_rounding") -> Module:
    module = clone(models.module(name))
    run_pipeline(module, parse_pipeline(pipeline))
    return module


class Fp32Tensors(Evaluator):
    """Every op computes in float64 and leaves float32 numbers."""

    def _round(self, array: Arr, type_: TensorType) -> Arr:
        out = super()._round(array, type_)
        return out.astype(np.float32).astype(out.dtype) if type_.dtype.is_float else out


def evaluate(module: Module, ids: Arr) -> tuple[Arr, Arr]:
    """(streams [T,n,d] before the head, logits [T,V]) of one call."""
    evaluator = Fp32Tensors(module, precision=np.float64)
    state = evaluator.fresh_state(B=1, ctx=len(ids))
    inputs = {"tokens": ids[None], "n_valid": np.array([len(ids)]), "rows": np.arange(len(ids))[None]}
    done = evaluator(inputs, state, trace=True)
    (head,) = (op for op in module.ops if op.name == "hc_head_mix")
    producer = head.operands[0].producer
    assert producer is not None
    return done.trace[producer][0][0], done.outputs["logits"][0]


def official(name: str) -> tuple[Arr, Arr]:
    """(streams, logits) of the first rows."""
    found = stored(f"golden/{name}/official.npz")
    return bf16_to_f32(found["last_streams"]), found["logits"]


def prompt(name: str, rows: int) -> Arr:
    return stored(f"golden/{name}/golden.npz")["input_ids"][:rows]


def equal_rows(streams: Arr, want: Arr) -> int:
    """How many rows at the start have equal streams, bit for bit."""
    same = (streams == want[: len(streams)]).all((1, 2))
    return int(np.argmin(same)) if not same.all() else len(same)


# ------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("name", ROWS)
def test_rows_up_to_the_first_flip(models: Models, name: str) -> None:
    rows = ROWS[name]
    streams, logits = evaluate(rounded(models, name), prompt(name, rows))
    want_streams, want_logits = official(name)
    assert equal_rows(streams, want_streams) == rows
    np.testing.assert_array_equal(logits.astype(np.float32), want_logits[:rows])
    exact = evaluate(models.module(name), prompt(name, rows))[1]
    apart = np.abs(exact - want_logits[:rows]).max(axis=1) / np.ptp(want_logits)
    assert apart.min() > 1e-2, "and not without"


def test_the_first_flip_is_one_rounding(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of "v4", in layer 1, row 27: the inverse rotation of two BF16 numbers cancels to -0.0059356, 5e-4 ulp
    of BF16 from a tie, where one ulp of an FP32 rotary frequency decides. Rounded the other way, the row
    agrees, and the rows behind it up to the next flip."""
    rotary, seen = attention.rotary, []

    def nudged(op: Op, x: Arr, cos: Arr, sin: Arr) -> Arr:
        out = rotary(op, x, cos, sin)
        if op.loc == "layers.1.attn" and op.attrs["inverse"]:
            seen.append(out[0, 27, 2, 135])
            out[0, 27, 2, 135] *= 1 + 1e-5
        return out

    name, rows = "v4", 44
    want = official(name)[0]
    module, ids = rounded(models, name), prompt(name, rows)
    assert equal_rows(evaluate(module, ids)[0], want) == 27
    monkeypatch.setattr(attention, "rotary", nudged)
    assert equal_rows(evaluate(module, ids)[0], want) == rows
    mantissa = np.frexp(abs(seen[0]))[0] * 256
    assert seen[0] == pytest.approx(-0.0059356, rel=1e-4) and abs(mantissa % 1 - 0.5) < 1e-3


SILENT = {
    "index_weights": "the factor of this model is a power of two, and what it multiplies is BF16 already",
    "index_scores": "no order of these 40 rows hangs on it",
    "route_eps": "1e-20 is lost in any sum of scores",
    "index_order": "of V4.1",
    "images": "of V4.1",
    "engram": "of V4.1",
}
"""Points that no row can show; filetests/apply_reference_rounding.ir and the tests of the ops hold them."""


@pytest.mark.parametrize("point", POINTS)
def test_every_rounding_point_is_seen(models: Models, point: str) -> None:
    """Without it some row before the flip is off, and most of those after it too."""
    name, rows = "v4_r16", ROWS["v4_r16"]
    module = rounded(models, name, f'apply_reference_rounding{{without="{point}"}}')
    streams, _ = evaluate(module, prompt(name, rows))
    found = equal_rows(streams, official(name)[0])
    assert found == rows if point in SILENT else found <= 22, f"{found} rows agree without {point}"


def replace_bf16(m: pytest.MonkeyPatch, other: Callable[[Arr], Arr]) -> None:
    for module in (quantise, core_meaning, attention, moe_meaning, rounding_meaning):
        m.setattr(module, "bf16", other)


def truncated_bf16(x: Arr) -> Arr:
    return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(x.dtype)


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "bf16 towards zero": lambda m: replace_bf16(m, truncated_bf16),
    "scale of the next power": lambda m: m.setattr(quantise, "ONE_448TH", np.float32(1 / 224)),
    "four mantissa bits": lambda m: m.setattr(
        quantise, "_steps", lambda v, mantissa, least, steps=quantise._steps: steps(v, mantissa + 1, least)
    ),
    "no subnormal codes": lambda m: m.setattr(
        quantise, "_steps", lambda v, mantissa, least, steps=quantise._steps: steps(v, mantissa, least - 9)
    ),
}
"""Wrong readings of the rules themselves."""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_rule_is_seen(models: Models, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    name, rows = "v4_r16", ROWS["v4_r16"]
    module = rounded(models, name)
    MUTANTS[mutant](monkeypatch)
    assert equal_rows(evaluate(module, prompt(name, rows))[0], official(name)[0]) < rows


# ------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("name", ROWS)
def test_the_targets_passes_keep_every_rounding_point(models: Models, name: str) -> None:
    """Rounded and then fused is the same function; a fusion across a rounding point would show."""
    ids = prompt(name, ROWS[name])
    want = evaluate(rounded(models, name), ids)[1]
    lowered = api.lower(models.module(name), passes="apply_reference_rounding,default").module
    assert {"expert_mlp", "index_select", "round_values"} <= {op.name for op in lowered.ops}
    np.testing.assert_allclose(evaluate(lowered, ids)[1], want, atol=1e-6)


@pytest.fixture
def artifacts(models: Models) -> dict[str, Path]:
    passes = "apply_reference_rounding,default"
    return {name: models.artifact(name, "tvm", passes=passes, golden=False) for name in ROWS}


COMPILED = {"v4": 26, "v4_r16": 26}
"""Rows before the first flip between float32 sums in the kernels' order and float64 sums."""


@pytest.mark.parametrize("name", ROWS)
def test_compiled_agrees_up_to_the_first_flip(artifacts: dict[str, Path], name: str) -> None:
    ids, want = prompt(name, 40), official(name)[1]
    session = dsv4c.Session(artifacts[name], context=64, threads=1)
    whole = np.asarray(session.step(ids[None]))[0]
    off = np.abs(whole - want[: len(ids)]).max(axis=1) / np.ptp(want)
    assert off[: COMPILED[name]].max() < 1e-5, np.flatnonzero(off > 1e-5)[:5]
    session.reset()
    singly = np.concatenate([np.asarray(session.step([[token]]))[0] for token in ids])
    np.testing.assert_array_equal(singly, whole, err_msg="a result depends on how tokens are cut into calls")


def test_states_hold_rounded_values(models: Models) -> None:
    """Window and entries are BF16 numbers whose first channels are E4M3 codes, keys are E2M1 codes."""
    ids = prompt("v4_r16", 40)
    judge = Judge(Evaluator(rounded(models, "v4_r16"), precision=np.float64), context=64)
    feed(judge, ids, [40])
    for name, values in judge.state.items():
        kind = name.split(".", 2)[-1]
        if kind in ("window", "entries"):
            np.testing.assert_array_equal(quantise.bf16(values), values, err_msg=name)
            first = values[..., :64]
            np.testing.assert_array_equal(quantise.blocks(quantise.e4m3, first, 64), first, err_msg=name)
        elif kind == "index.entries":
            np.testing.assert_array_equal(quantise.blocks(quantise.e2m1, values, 32), values, err_msg=name)


def test_onnx_refuses(models: Models) -> None:
    with pytest.raises(TargetError, match=r"round_values is not legal here|hadamard is not legal here"):
        api.lower(models.module("v4_r16"), format="onnx", passes="apply_reference_rounding,default")


@pytest.mark.parametrize("numerics", ["bf16", "int8", "reference"])
def test_onnx_offers_exact_numerics(models: Models, tmp_path: Path, numerics: str) -> None:
    with pytest.raises(UsageError, match=f"numerics '{numerics}'; allowed: exact"):
        dsv4c.compile(models.checkpoint("v4"), output=tmp_path / "m.dsv4", format="onnx", numerics=numerics)


def test_rounding_by_attribute_is_never_dropped(models: Models, tmp_path: Path) -> None:
    """Where no op of its own says that there is rounding, the emitters still see the attribute."""
    others = ",".join(p for p in POINTS if p != "probabilities")
    pipeline = f'apply_reference_rounding{{without="{others}"}},default'
    with pytest.raises(TargetError, match="attention with rounding = 'reference' has no ONNX lowering"):
        dsv4c.compile(
            models.module("v4_r16"), output=tmp_path / "m.dsv4", format="onnx", passes=pipeline, golden=False
        )


def test_selection_in_one_kernel_or_three(models: Models, artifacts: dict[str, Path], tmp_path: Path) -> None:
    """Index scores kept between kernels are rounded as those that are not: the logits are the same bits."""
    pipeline = "apply_reference_rounding,default,without(fuse_index_select)"
    output, ids = tmp_path / "m.dsv4", prompt("v4_r16", 40)
    apart = dsv4c.compile(models.module("v4_r16"), output=output, passes=pipeline, golden=False)
    found = [
        dsv4c.Session(path, context=64, threads=1).step(ids[None]) for path in (apart, artifacts["v4_r16"])
    ]
    np.testing.assert_array_equal(*found)


def test_a_bf16_checkpoint_quantises_no_input(models: Models) -> None:
    """Its keys and entries still are, and index vectors."""
    module = clone(models.module("ratio128"))
    run_pipeline(module, parse_pipeline("apply_reference_rounding"))
    counts = module.notes["apply_reference_rounding"]
    assert "linear_input" not in counts and counts["kv"] == 5 and counts["index"] == 2
    lowered = api.lower(models.module("ratio128"), passes="apply_reference_rounding,default").module
    assert {op.attrs["rounding"] for op in lowered.ops if op.name == "expert_mlp"} == {"bf16"}


def test_the_pass_runs_once(models: Models) -> None:
    """Not on its own result at another level; the error says which level it takes."""
    with pytest.raises(PassError, match="does not take level FUSED"):
        rounded(models, "ratio128", "fuse_swiglu,apply_reference_rounding")
